"""Hostile and unfortunate files: recognized, named, never executed, never larger in memory than they are on disk."""

import io
import os
import pickle
import struct
import zipfile

import pytest
import torch

from ddkit.challenge import GLYPHS
from ddkit.sets.reading import read_tensor, read_tensor_bytes

IPC = 2
SHAPE = (IPC * GLYPHS.num_classes, *GLYPHS.image_shape)


@pytest.fixture
def images():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def read(data):
    tensor, findings = read_tensor_bytes(data, "glyphs.pt", GLYPHS, ipc=IPC)
    return tensor, [finding.code for finding in findings], " ".join(finding.message for finding in findings)


class Hostile:
    """Touches a file when unpickled by a loader that executes."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_a_bare_tensor_is_read_as_it_was_saved(images):
    tensor, codes, _ = read(saved(images))
    assert codes == []
    assert torch.equal(tensor, images)


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda t: {"images": t}, "T001", "a dict with the keys 'images'"),
        (lambda t: [t, t], "T001", "a list of 2"),
        (lambda t: 3.5, "T001", "a float"),
        (lambda t: t.double(), "T002", "float64"),
        (lambda t: t.half(), "T002", "float16"),
        (lambda t: t.to(torch.complex64), "T002", "complex64"),
        (lambda t: t[:-1].clone(), "T003", "19 rows"),
        (lambda t: t[:10].clone(), "T003", "10 rows (1 a class)"),
        (lambda t: t.permute(0, 2, 3, 1).contiguous(), "T003", "channels last"),
        (lambda t: t[:, :, :16].clone(), "T003", "(20, 3, 16, 32)"),
        (lambda t: torch.cat([t, t])[: len(t)], "T006", "a view"),
        (lambda t: t[:1].clone().expand(SHAPE), "T006", "expanded from fewer numbers"),
        (lambda t: t.to_sparse(), "T008", "sparse"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "T008", "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_submission_is_refused_and_named(images, make, code, words):
    tensor, codes, message = read(saved(make(images)))
    assert tensor is None
    assert code in codes and words in message


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda t: t.requires_grad_(), "T005"),
        (lambda t: torch.nn.Parameter(t), "T005"),
        (lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), "T007"),
    ],
)
def test_what_the_scorer_takes_all_the_same_is_a_warning(images, make, code):
    tensor, codes, _ = read(saved(make(images.clone())))
    assert codes == [code]
    assert torch.equal(tensor.detach(), images)


def test_a_tensor_saved_on_a_gpu_is_refused_before_it_is_loaded(images):
    data = saved(images)
    # Where no GPU is at hand to save from: the device's name is the only difference. "cpu" as a pickled string.
    on_gpu = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(on_gpu, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(struct.pack("<cI", b"X", 3) + b"cpu", struct.pack("<cI", b"X", 6) + b"cuda:0")
            new.writestr(name, content)
    tensor, codes, message = read(on_gpu.getvalue())
    assert tensor is None and codes == ["T004"] and "cuda:0" in message


@pytest.mark.parametrize("wrap", [lambda h, t: h, lambda h, t: {"images": t, "more": h}, lambda h, t: [h] * 3])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path, images, wrap):
    canary = tmp_path / "canary"
    tensor, codes, message = read(saved(wrap(Hostile(canary), images)))
    assert tensor is None and codes == ["F006"]
    assert "posix.mkdir" in message or "nt.mkdir" in message
    assert not canary.exists()


def test_a_bare_pickle_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    tensor, codes, _ = read(pickle.dumps(Hostile(canary)))
    assert tensor is None and codes == ["F006"]
    assert not canary.exists()


def test_the_legacy_format_is_refused(images):
    assert read(saved(images, _use_new_zipfile_serialization=False))[1] == ["F007"]


@pytest.mark.parametrize("data", [b"", b"PK", b"not a tensor at all", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(5000)])
def test_files_of_another_kind_are_refused(data):
    tensor, codes, _ = read(data)
    assert tensor is None and codes[0] in ("F004", "F005")


def test_a_file_cut_short_anywhere_is_refused(images):
    data = saved(images)
    for percent in range(100):
        tensor, codes, message = read(data[: len(data) * percent // 100])
        assert tensor is None and codes == ["F005"], (percent, message)


def test_a_storage_shorter_than_the_tensor_claims_is_refused(images):
    small, large = saved(images[:1].clone()), saved(images)
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(large)) as old, zipfile.ZipFile(io.BytesIO(small)) as short:
        with zipfile.ZipFile(forged, "w") as new:
            for name in old.namelist():
                new.writestr(name, (short if "/data/" in name else old).read(name))
    tensor, codes, _ = read(forged.getvalue())
    assert tensor is None and codes == ["F005"]


def test_a_compressed_bomb_in_a_tensor_file_is_refused(images):
    bomb = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(images))) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(200_000_000) if "/data/0" in name else old.read(name))
    assert len(bomb.getvalue()) < 1_000_000
    tensor, codes, message = read(bomb.getvalue())
    assert tensor is None and codes == ["F005"] and "compressed" in message


def test_a_directory_that_claims_too_much_is_not_read(images):
    data = bytearray(saved(images))
    at = data.rfind(b"PK\x06\x06")  # the record that counts, in the 64-bit form that torch.save writes
    data[at + 40 : at + 48] = struct.pack("<Q", 2_000_000_000)
    tensor, codes, message = read(bytes(data))
    assert tensor is None and codes == ["F005"] and "2,000,000,000 bytes" in message


def test_a_directory_elsewhere_than_it_is_said_to_be_is_not_read(images):
    data = bytearray(saved(images))
    at = data.rfind(b"PK\x06\x06")
    decoy = bytes(data[at : at + 56])
    struct.pack_into("<Q", data, at + 40, 2_000_000_000)  # where some programs look
    struct.pack_into("<Q", data, at + 56 + 8, at)
    moved = bytes(data[:at]) + decoy + bytes(data[at:])  # and where others do
    tensor, codes, message = read(moved)
    assert tensor is None and codes == ["F005"] and "list of members is damaged" in message


def test_a_refusal_never_advises_to_load_without_restrictions():
    broken = io.BytesIO()
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02K\x010.")  # POP, which the restricted loader does not know
        archive.writestr("archive/version", b"3\n")
    tensor, codes, message = read(broken.getvalue())
    assert tensor is None and codes == ["F005"] and "weights_only" not in message


def test_tuples_of_the_same_tuples_are_refused_before_anything_is_hashed():
    """A dict whose key has 2 ** 40 parts: the restricted loader alone would hash it for days."""
    pickled = b"\x80\x02}q\x00K\x01K\x01\x86q\x01"
    for level in range(1, 40):
        pickled += b"h%ch%c\x86q%c" % (level, level, level + 1)
    laughs = io.BytesIO()
    with zipfile.ZipFile(laughs, "w") as archive:
        archive.writestr("archive/data.pkl", pickled + b"h\x00h\x28K\x01s.")
        archive.writestr("archive/data/0", b"")
        archive.writestr("archive/version", b"3\n")
    tensor, codes, message = read(laughs.getvalue())
    assert tensor is None and codes == ["F005"] and "unfolds" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "glyphs.pt")
    tensor, findings = read_tensor(tmp_path / "glyphs.pt", GLYPHS, ipc=IPC)
    assert tensor is None and [f.code for f in findings] == ["F004"] and "pipe" in findings[0].message


def test_a_missing_file_is_a_finding(tmp_path):
    tensor, findings = read_tensor(tmp_path / "absent.pt", GLYPHS, ipc=IPC)
    assert tensor is None and findings[0].code == "F001"


def test_any_whole_number_of_images_per_class_where_none_is_asked_for(images):
    tensor, findings = read_tensor_bytes(saved(images), "glyphs.pt", GLYPHS, ipc=None)
    assert findings == [] and len(tensor) == len(images)
    tensor, findings = read_tensor_bytes(saved(images[:13].clone()), "glyphs.pt", GLYPHS, ipc=None)
    assert tensor is None and "no multiple of the 10 classes" in findings[0].message


def test_two_members_of_one_name_are_refused_as_pytorch_may_load_the_other(tmp_path, images):
    """PyTorch finds members whatever their case."""
    buffer = io.BytesIO(saved(images))
    with zipfile.ZipFile(buffer, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        archive.writestr(name.upper(), pickle.dumps(Hostile(tmp_path / "canary")))
    tensor, codes, said = read(buffer.getvalue())
    assert tensor is None and codes == ["F005"] and "two members of the same name" in said
    assert not (tmp_path / "canary").exists()


def test_keys_of_a_strangers_dict_are_shown_in_a_few_letters():
    deep = ()
    for _ in range(100):
        deep = (deep,)
    tensor, codes, said = read(saved({deep: 1, "k" * 50_000: 2}))
    assert tensor is None and codes == ["T001"] and "one of type tuple" in said and len(said) < 300
