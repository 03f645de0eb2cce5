"""`quick_gguf`: what transformers reads through it is what gguf reads alone."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import MODEL_ARCH
from transformers import modeling_gguf_pytorch_utils as reading

from fedraclora.data.gguf_reader import quick_gguf


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file with a vocabulary and two tensors, one of them quantized."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {k}" for k in range(50)])
    writer.add_token_scores([k / 7 for k in range(50)])
    writer.add_head_count(3)
    rows = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    writer.add_tensor("plain", rows)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("few bits", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_same_contents(stored: Path) -> None:
    alone = gguf.GGUFReader(stored)
    with quick_gguf():
        quick = gguf.GGUFReader(stored)
    assert type(quick) is not type(alone)
    assert quick.fields.keys() == alone.fields.keys()
    for name, field in alone.fields.items():
        assert quick.fields[name].contents() == field.contents()
        assert quick.fields[name].types == field.types
    for one, other in zip(quick.tensors, alone.tensors, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(one.data, other.data)


def test_names_are_equal_and_the_library_is_as_before() -> None:
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(KeyError), quick_gguf():  # noqa: PT012  an error inside
        first = gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
        assert first is gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
        assert first.mapping == names(MODEL_ARCH.LLAMA, 2).mapping
        raise KeyError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)


def test_metadata_is_parsed_once_and_anew_when_the_file_changes(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    def load(path: str, return_tensors: bool = False, **_: object) -> dict[str, dict[str, int]]:
        parsed.append(path)
        return {"config": {"size": Path(path).stat().st_size}, "tensors": {"w": 1}}

    monkeypatch.setattr(reading, "load_gguf_checkpoint", load)
    with quick_gguf():
        first = reading.load_gguf_checkpoint(stored)
        first["config"].clear()  # as transformers does
        again = reading.load_gguf_checkpoint(stored, return_tensors=False)
    assert again["config"] == {"size": stored.stat().st_size}
    assert len(parsed) == 1
    with quick_gguf():
        reading.load_gguf_checkpoint(stored, return_tensors=True, model_to_load=None)
        assert len(parsed) == 2
        stored.write_bytes(stored.read_bytes() + b"0" * 32)
        assert reading.load_gguf_checkpoint(stored)["config"] == {"size": stored.stat().st_size}
    assert reading.load_gguf_checkpoint is load
