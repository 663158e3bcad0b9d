"""Two packages write into the folder `flash_attn`: which is there is told by their distributions."""

import sys

import pytest
import torch

from lctrain.kernels.base import Demand
from lctrain.kernels.flash import FlashKernel
from lctrain.kernels.flash2 import Flash2Kernel

DEMAND = Demand(device_type="cuda", dtype=torch.bfloat16, head_dim=128, softcap=None)
FLASH_4, FLASH_2 = ("flash-attn-4", "4.0.0b36"), ("flash-attn", "2.8.3.post2")


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Write a package as pip does: its files over what is there, and their sizes into its RECORD."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def install(name, version):
        files = {"flash_attn/cute/interface.py": f"# of {name}", "flash_attn/cute/__init__.py": ""}
        if name == "flash-attn":
            files |= {"flash_attn/__init__.py": "", "flash_attn_2_cuda.py": ""}
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        record = "".join(f"{file},,{len(text)}\n" for file, text in files.items())
        files |= {f"{info}/METADATA": f"Name: {name}\nVersion: {version}\n", f"{info}/RECORD": record}
        for file, text in files.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return install


@pytest.mark.parametrize(
    ("installed", "flash", "flash2"),
    [
        ([], "needs flash-attn-4", "needs flash-attn 2.8"),
        ([FLASH_4], None, "needs flash-attn 2.8"),
        ([FLASH_2], "needs flash-attn-4", None),
        ([("flash-attn", "2.7.4")], "needs flash-attn-4", "needs flash-attn 2.8"),
        ([FLASH_2, FLASH_4], None, None),
        ([FLASH_4, FLASH_2], "finds flash-attn-4 overwritten by flash-attn 2", None),
    ],
)
def test_each_is_known_by_its_distribution(install, installed, flash, flash2):
    for name, version in installed:
        install(name, version)
    for kernel, reason in ((FlashKernel, flash), (Flash2Kernel, flash2)):
        said = kernel.refusal(DEMAND)
        assert (said is None) if reason is None else said.startswith(reason)
