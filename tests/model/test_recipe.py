import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.config import asset
from lctrain.errors import InputError
from lctrain.memory.savings import NOTHING
from lctrain.model.recipe import ScratchModel
from lctrain.model.tuning import Frozen, FullTuning, LoRATuning
from lctrain.rope.linear import LinearScaling
from lctrain.rope.none import NoScaling
from lctrain.rope.yarn import YaRN

LORA = LoRATuning(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj"], trainable=[])


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved("llama"), tmp_path / "model")


def refused(recipe, pattern):
    """By check, which reads no weight, and by build alike."""
    for act in (lambda: recipe.check([64]), recipe.build):
        with pytest.raises(InputError, match=pattern):
            act()


class TestWhatLoads:
    def test_check_then_build(self, recipe, ids, saved):
        made = recipe("llama")
        made.check([16, 64])
        tokens = ids(1, 20)
        plain = AutoModelForCausalLM.from_pretrained(saved("llama"))
        torch.testing.assert_close(
            made.build().eval()(input_ids=tokens).logits, plain(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
        )
        assert len(made.tokenizer) == 64

    def test_config_is_stretched(self, recipe):
        config = recipe("llama", rope=YaRN(), sequence_length=512).config()
        assert config.rope_parameters["factor"] == 8.0
        assert config.max_position_embeddings == 512

    def test_own_window_is_kept_or_replaced_and_the_log_says_which(self, recipe, caplog):
        with caplog.at_level("INFO"):
            kept = recipe("mistral", shape={"sliding_window": 9}).config()
        assert kept.sliding_window == 9
        assert "own window of 9 tokens is kept" in caplog.text
        with caplog.at_level("INFO"):
            replaced = recipe(
                "mistral", shape={"sliding_window": 9}, attention=SlidingWindowAttention(sliding_window=5)
            ).config()
        assert replaced.sliding_window == 5
        assert "own window of 9 tokens is replaced by 5" in caplog.text

    def test_parameter_counts_are_logged(self, recipe, caplog):
        with caplog.at_level("INFO"):
            model = recipe("llama", tuning=LORA).build()
        trainable = 2 * 2 * (32 + 32)
        assert (
            f"{trainable:,} trainable ({100 * trainable / sum(p.numel() for p in model.parameters()):.2f}%)"
            in caplog.text
        )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_dtype(self, recipe, dtype):
        assert {p.dtype for p in recipe("llama", dtype=dtype, tuning=Frozen()).build().parameters()} == {
            getattr(torch, dtype)
        }

    @pytest.mark.parametrize("tuning", [FullTuning(), LORA])
    def test_what_trains_is_kept_in_fp32(self, recipe, tuning):
        model = recipe("llama", dtype="bfloat16", tuning=tuning).build()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

    def test_auto_dtype_is_the_folders(self, folder, recipe):
        AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
        assert recipe(folder, tuning=Frozen()).build().dtype == torch.bfloat16

    @pytest.mark.parametrize("rope", [NoScaling(), LinearScaling(), YaRN()])
    def test_angles_of_a_bf16_model_are_exact_at_position_100k(self, recipe, rope):
        rotary = recipe("llama", dtype="bfloat16", rope=rope, sequence_length=100_000).build().model.rotary_emb
        assert rotary.inv_freq.dtype == torch.float32
        positions = torch.tensor([[99_999]])
        exact = positions.double() * rotary.inv_freq.double()
        cos, _ = rotary(torch.zeros(1, dtype=torch.float32), positions)
        scale = rotary.attention_scaling
        torch.testing.assert_close(cos[0, 0, :4].double(), scale * exact[0].cos(), rtol=0, atol=5e-3)

    def test_memory_is_saved(self, recipe):
        saved = replace(NOTHING, checkpoint_layers=1)
        layers = recipe("llama", memory=saved).build().model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [True, False]
        assert not recipe("llama").build().model.layers[0].gradient_checkpointing

    def test_pickled_weights_load_when_asked(self, folder, recipe, ids):
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        refused(recipe(folder), "holds no weights in safetensors format")
        made = recipe(folder, use_safetensors=False)
        made.check([64])
        assert torch.equal(made.build().model.embed_tokens.weight, weights["model.embed_tokens.weight"])


class TestRefusals:
    def test_no_folder(self, recipe, tmp_path):
        refused(recipe(tmp_path / "nowhere"), r"model.path=.*nowhere does not exist; give a folder")

    def test_no_config(self, folder, recipe):
        (folder / "config.json").unlink()
        refused(recipe(folder), "has no config.json")

    def test_a_config_that_is_no_json(self, folder, recipe):
        (folder / "config.json").write_text("{")
        refused(recipe(folder), "model.path=")

    def test_an_unknown_architecture(self, folder, recipe):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
        refused(recipe(folder), "unheard_of")

    def test_no_weights(self, folder, recipe):
        (folder / "model.safetensors").unlink()
        refused(recipe(folder), "holds no weights in safetensors format")

    @pytest.mark.parametrize("keep", [4, 200, -1000])
    def test_truncated_weights(self, folder, recipe, keep):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        refused(recipe(folder), r"model.safetensors is truncated or not a safetensors file")

    def test_missing_tensor(self, folder, recipe):
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"weights missing or of another shape: model.layers.1.mlp.up_proj.weight"):
            recipe(folder).build()

    def test_tensor_of_another_shape(self, folder, recipe):
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(31)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"weights missing or of another shape: .*model.norm.weight"):
            recipe(folder).build()

    def test_missing_shard(self, folder, recipe):
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
        shards = sorted(folder.glob("model-*.safetensors"))
        assert len(shards) > 1
        (folder / "model.safetensors").unlink(missing_ok=True)
        recipe(folder).build()
        shards[-1].unlink()
        with pytest.raises(InputError, match=shards[-1].name):
            recipe(folder).build()

    def test_a_tokenizer_of_another_model(self, folder, recipe):
        PreTrainedTokenizerFast.from_pretrained(asset("tiny-base")).save_pretrained(folder)
        with pytest.raises(InputError, match=r"the tokenizer knows \d+ tokens, the embedding only 64"):
            recipe(folder).check([64])

    def test_no_tokenizer(self, folder, recipe):
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(InputError, match="has no tokenizer that loads"):
            recipe(folder).check([64])

    def test_code_in_the_folder_does_not_run(self, folder, recipe):
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
        refused(recipe(folder), "trust_remote_code|custom code")
        assert not (folder / "ran").exists()

    @pytest.mark.parametrize("dtype", ["float33", "nn", "load"])
    def test_no_dtype(self, recipe, dtype):
        with pytest.raises(InputError, match=f"model.dtype={dtype} is not a torch dtype"):
            recipe("llama", dtype=dtype).build()

    def test_lengths_reach_the_method(self, recipe):
        with pytest.raises(InputError, match="a sequence of 62 tokens is not divisible"):
            recipe("llama", attention=ShiftedSparseAttention()).check([62, 64])

    def test_rows_longer_than_positions_reach(self, recipe):
        with pytest.raises(InputError, match="rows of 66 tokens are longer than model"):
            recipe("llama").check([64, 66])

    def test_a_model_without_key_value_heads(self, folder, recipe):
        config = AutoConfig.for_model(
            "gpt_neox", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
        )
        config.save_pretrained(folder)
        with pytest.raises(InputError, match="gpt_neox tells no num_key_value_heads"):
            recipe(folder).check([64])


class TestArchitecture:
    def test_plans_a_hub_model_without_the_hub(self, recipe):
        architecture = {"model_type": "llama", "num_hidden_layers": 3, "max_position_embeddings": 100}
        config = recipe(
            "llama", path="someone/model", architecture=architecture, rope=LinearScaling(), sequence_length=400
        )
        assert config.config().num_hidden_layers == 3
        assert config.config().rope_parameters["factor"] == 4.0

    def test_a_folder_of_another_shape_is_refused(self, recipe):
        recipe("llama", architecture={"model_type": "llama", "num_hidden_layers": 2}).check([64])
        with pytest.raises(InputError, match=r"model.architecture.num_hidden_layers is 3, but .* has 2"):
            recipe("llama", architecture={"model_type": "llama", "num_hidden_layers": 3}).check([64])


class TestScratch:
    def make(self, saved, **changes):
        architecture = {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        }  # fmt: skip
        settings = {
            "architecture": architecture, "tokenizer_path": str(saved("llama")), "attention": FullAttention(),
            "rope": NoScaling(), "tuning": FullTuning(), "sequence_length": 64, "kernel": "auto", "dtype": "float32",
            "memory": NOTHING, "layer_kernel": "auto", "precision": None,
        }  # fmt: skip
        return ScratchModel(**settings | changes)

    def test_takes_vocabulary_and_special_tokens_from_the_tokenizer(self, saved):
        made = self.make(saved)
        made.check([64])
        config = made.build().config
        assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (64, 0, 1)

    def test_the_seed_decides_the_weights(self, saved):
        def weights(seed):
            torch.manual_seed(seed)
            return self.make(saved).build().model.layers[0].mlp.up_proj.weight

        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))

    def test_angles_of_a_bf16_model_stay_fp32(self, saved):
        model = self.make(saved, dtype="bfloat16", tuning=Frozen()).build()
        assert model.dtype == torch.bfloat16
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32

    def test_no_tokenizer(self, saved, tmp_path):
        with pytest.raises(InputError, match=r"model.tokenizer_path="):
            self.make(saved, tokenizer_path=str(tmp_path / "nowhere")).config()
