"""Share one row between devices. This folder gets callables and tensors, and knows no attention method."""
