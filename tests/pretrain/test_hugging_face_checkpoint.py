"""Checkpoints of any layout open with transformers and give the same logits; what comes back is what went."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from launch.export import main as export
from launch.export import size_in_bytes
from launch.import_weights import main as import_weights
from model_providers.errors import ModelError
from model_providers.layer_plan import BERTInputs
from pretrain.errors import RunError
from pretrain.generate import load_trained
from tests.model_providers.test_bert import bert
from tests.model_providers.test_hugging_face_experts import deepseek_v3
from tests.model_providers.test_t5 import t5
from tests.pretrain.test_resume import eight, train
from tests.ranks import RankPool

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
THEIRS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "bert": bert,
    "t5": lambda: t5("t5"),
    "t5-1.1": lambda: t5("t5-1.1"),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek_v3": deepseek_v3,
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("shard_size", ["5GB", "0.02MB"])
def test_what_comes_in_goes_out_unchanged(tmp_path: Path, kind: str, shard_size: str) -> None:
    torch.manual_seed(1)
    theirs = THEIRS[kind]().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    byte_tokenizer(tmp_path / "theirs")
    import_weights([str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    export([str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--shard-size", shard_size])
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert before.keys() <= after.keys() | {"lm_head.weight"}
    assert all(torch.equal(after[name], before[name]) for name in before if name in after)
    assert (tmp_path / "back" / "model.safetensors.index.json").exists() == (shard_size != "5GB")
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    tokens = torch.arange(40).reshape(2, 20)
    inputs = {"input_ids": tokens}
    if kind.startswith("t5"):
        inputs["decoder_input_ids"] = tokens[:, :7]
    wanted = theirs(**inputs)[0]
    torch.testing.assert_close(again(**inputs)[0], wanted, rtol=1e-5, atol=1e-5)
    mine = logits_of(tmp_path / "ours", tuple(inputs.values()))
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def byte_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "bytes"}')


@torch.no_grad()
def logits_of(run: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[b s v]"""
    trained = load_trained(run, torch.device("cpu"))
    value: Any = inputs if len(inputs) > 1 else inputs[0]
    for layer in trained.layers:
        value = layer(value)
    logits = value if isinstance(value, torch.Tensor) else value[0]
    return logits.transpose(0, 1)[..., : trained.config.model.known_vocab_size]


EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-pp2": (4, {"layout": {"tp": 2, "pp": 2}, "model__qk_norm": False}),
    "zero3": (2, {"deepspeed": "zero3.json", "model__qk_norm": False}),
    "ep2-etp2": (
        4,
        {"layout": {"tp": 2, "ep": 2, "etp": 2, "sequence_parallel": True}, "model__moe": EXPERTS},
    ),
}


@pytest.mark.ranks
@pytest.mark.parametrize("layout", RUNS)
def test_a_run_of_any_layout_opens_with_transformers(
    ranks: RankPool, corpus: str, tmp_path: Path, layout: str
) -> None:
    world_size, changes = RUNS[layout]
    raw = eight(corpus, tmp_path / "run", **changes)
    ranks.run(train, world_size, raw, 3)
    folder = Path(raw["out"]) / raw.get("name", "run")
    export([str(folder), "--out", str(tmp_path / "out")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(32).reshape(2, 16)
    torch.testing.assert_close(logits_of(folder, (tokens,)), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(["a rose is a rose"], trainer)
    theirs = THEIRS["llama"]()
    theirs.save_pretrained(tmp_path / "theirs")
    pieces.save(str(tmp_path / "theirs" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings))
    import_weights([str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    export([str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--dtype", "bf16"])
    again = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again("a rose")["input_ids"] == pieces.encode("a rose").ids
    facts = json.loads((tmp_path / "back" / "config.json").read_text())
    assert facts["eos_token_id"] == again.eos_token_id == pieces.token_to_id("<|endoftext|>")
    assert facts["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors(tmp_path / "back").values()} == {torch.bfloat16}


def test_an_encoder_alone_keeps_initial_heads_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = bert().bert.eval()
    theirs.save_pretrained(tmp_path / "theirs")
    byte_tokenizer(tmp_path / "theirs")
    import_weights([str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    assert "an encoder alone: head.transform.weight" in capsys.readouterr().out
    trained = load_trained(tmp_path / "ours", torch.device("cpu"))
    tokens = torch.arange(40).reshape(2, 20)
    value: Any = BERTInputs(tokens)
    with torch.no_grad():
        for layer in trained.layers[:-1]:
            value = layer(value)
        wanted = theirs(tokens).last_hidden_state
    torch.testing.assert_close(value.hidden.transpose(0, 1), wanted, rtol=1e-5, atol=1e-5)


def saved(folder: Path) -> Path:
    THEIRS["mixtral"]().save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def of_another_kind(folder: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"model_type": "mamba"}))


def deeper_than_it_is(folder: Path) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": 3}))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, "no config.json there; give a folder as transformers saves a model"),
        (without_weights, "no \\*.safetensors there; it has pickled weights"),
        (cut_off, "model.safetensors cannot be read"),
        (of_another_kind, "model_type=mamba: not known here; convertible are gpt2, llama"),
        (deeper_than_it_is, "model.layers.2.input_layernorm.weight is missing"),
        (without_tokenizer, "its tokenizer cannot be read"),
    ],
)
def test_a_broken_folder_is_one_line_and_leaves_nothing(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = saved(tmp_path / "theirs")
    spoil(folder)
    with pytest.raises((RunError, ModelError), match=message):
        import_weights([str(folder), "--out", str(tmp_path / "ours")])
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs")
    import_weights([str(folder), "--out", str(tmp_path / "ours")])
    with pytest.raises(RunError, match=r"--out=.*exists already; name a folder that does not"):
        export([str(tmp_path / "ours"), "--out", str(folder)])


@pytest.mark.parametrize("text", ["5", "0GB", "-1GB", "five GB"])
def test_a_wrong_shard_size_says_how_it_is_written(text: str) -> None:
    with pytest.raises(RunError, match=r"must be a number with MB or GB"):
        size_in_bytes(text)
