"""How much of the host's memory may be used."""

import os

import pytest

from lctrain.memory.host import memory_limit

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GROUP = "system.slice/slurmstepd.scope/job_7"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        (f"0::/{GROUP}/step_0\n", {f"{GROUP}/memory.max": "2048\n", f"{GROUP}/step_0/memory.max": "max\n"}, 2048),
        ("0::/\n", {"memory.max": "4096\n"}, 4096),
        (f"0::/{GROUP}\n", {f"{GROUP}/memory.max": "max\n", "elsewhere/memory.max": "1\n"}, PHYSICAL),
        (
            f"9:cpu:/x\n4:memory:/{GROUP}\n",
            {f"memory/{GROUP}/memory.limit_in_bytes": "1024\n", "x/memory.max": "1"},
            1024,
        ),
        (f"4:memory:/{GROUP}\n", {f"memory/{GROUP}/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, PHYSICAL),
        (None, {"memory.max": "1\n"}, PHYSICAL),
    ],
)
def test_a_job_may_use_less_than_there_is(tmp_path, own, files, limit):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    if own:
        (tmp_path / "own").write_text(own)
    assert memory_limit(tmp_path / "own", tmp_path / "groups") == limit
