"""Composing, checking and dumping configs; naming mistakes in them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lctrain import config
from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Window:
    sliding_window: int

    def __post_init__(self):
        if self.sliding_window < 1:
            raise InputError("sliding_window=0 must be at least 1")
        if self.sliding_window == 12:
            raise ValueError("12 is no\nwidth")
        if self.sliding_window == 14:
            further_down()
        if self.sliding_window == 13:
            raise ZeroDivisionError("a bug")


def further_down():
    raise ValueError("a bug")


def refusal(**fields):
    """What `explain` makes of the failing constructor of a Window two levels down."""
    with pytest.raises(InstantiationException) as caught:
        instantiate(OmegaConf.create({"outer": {"_target_": f"{__name__}.Window"} | fields}))
    return config.explain(caught.value, "train")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"slidng_window": 4}, "no such option 'outer.slidng_window'; did you mean 'outer.sliding_window'?"),
        ({"sliding_window": 12}, "outer: 12 is no width"),
        ({"sliding_window": "4"}, "outer: '<' not supported between instances of 'str' and 'int'"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({}, "outer: Window.__init__() missing 1 required keyword-only argument: 'sliding_window'"),
    ],
)
def test_what_a_constructor_refuses_is_the_users_mistake(fields, line):
    assert str(refusal(**fields)) == line


def test_an_option_goes_by_the_name_that_sets_it():
    cfg = config.compose("train", ["experiment=duo_tiny", "attention=full"])
    with pytest.raises(InstantiationException) as caught:
        instantiate(cfg.module)
    explained = config.explain(caught.value, "train")
    assert str(explained) == "no such option 'attention.num_sink_tokens'"


def test_a_target_that_is_not_there_is_named():
    assert "no_such_module" in str(refusal(_target_="no_such_module.Window"))


@pytest.mark.parametrize("width", [13, 14])
def test_a_bug_in_a_constructor_or_below_it_is_not_the_users(width):
    assert refusal(sliding_window=width) is None


def test_compose_names_the_nearest():
    with pytest.raises(InputError, match=r"no rope 'yran'; did you mean 'yarn'\?"):
        config.compose("train", ["rope=yran"])


def test_compose_takes_overrides():
    cfg = config.compose("train", ["sequence_length=8192", "attention=sliding_window"])
    assert cfg.model.sequence_length == 8192
    assert cfg.model.attention.sliding_window == cfg.attention.sliding_window


def test_check_names_all_that_is_missing():
    with pytest.raises(InputError, match=r"no value for 'a', 'b\.c\.0': give a=… b\.c\.0=…"):
        config.check(OmegaConf.create({"a": "???", "b": {"c": ["???"]}, "d": "${a}"}))


def test_check_names_an_interpolation_that_leads_nowhere():
    with pytest.raises(InputError, match=r"cannot resolve 'b\.c': .*nowhere"):
        config.check(OmegaConf.create({"b": {"c": "${nowhere}"}}))


def test_asset_is_in_data():
    config.register_resolvers()
    path = Path(OmegaConf.create({"path": "${asset:tiny-base}"}).path)
    assert path.is_absolute()
    assert path.parts[-2:] == ("data", "tiny-base")


def test_dump_is_resolved_and_holds_no_secret(monkeypatch):
    monkeypatch.setenv("LCTRAIN_TEST_API_KEY", "f00dfacef00dface")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "1")
    cfg = OmegaConf.create(
        {
            "length": 4096,
            "same": "${length}",
            "logger": {"api_key": "anything", "settings": ["${oc.env:LCTRAIN_TEST_API_KEY}", "plain"]},
            "url": "https://user:f00dfacef00dface@host",
            "hub": {"token": "hf_anything", "password": None},
            "num_sink_tokens": 4,
            "text": "a1b",
        }
    )
    assert OmegaConf.create(config.dump(cfg)) == {
        "length": 4096,
        "same": 4096,
        "logger": {"api_key": "***", "settings": ["***", "plain"]},
        "url": "***",
        "hub": {"token": "***", "password": None},
        "num_sink_tokens": 4,
        "text": "a1b",
    }
