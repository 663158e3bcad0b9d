"""How one row is shared between devices. Handed callables and tensors; knows no attention method."""
