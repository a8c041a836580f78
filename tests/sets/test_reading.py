"""Hostile and unfortunate files: recognized, named, never executed, never larger in memory than they are on disk."""

import collections
import io
import os
import pickle
import re
import struct
import zipfile

import numpy
import PIL.Image
import pytest
import torch

from ddkit.challenge import GLYPHS
from ddkit.data.images import denormalize, normalize, to_uint8
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
        (lambda t: t.to(torch.float8_e4m3fn), "T002", "float8_e4m3fn"),
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
def test_file_that_is_not_a_submission_is_refused_and_named(images, make, code, words):
    tensor, codes, message = read(saved(make(images)))
    assert tensor is None
    assert code in codes and words in message


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_pixels_as_whole_numbers_are_refused_with_the_line_that_normalizes_them(images, dtype):
    pixels = to_uint8(denormalize(images, GLYPHS))
    _, codes, message = read(saved(pixels.to(dtype)))
    assert codes == ["T002"] and str(dtype).removeprefix("torch.") in message
    converted = eval(message.partition("for white: ")[2], {"torch": torch, "tensor": pixels.to(dtype)})
    assert torch.equal(converted, normalize(pixels, GLYPHS))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda t: t.requires_grad_(), "T005"),
        (lambda t: torch.nn.Parameter(t), "T005"),
        (lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), "T007"),
    ],
)
def test_tensor_that_the_scorer_still_takes_is_a_warning(images, make, code):
    tensor, codes, _ = read(saved(make(images.clone())))
    assert codes == [code]
    assert torch.equal(tensor.detach(), images)


class Subclass(torch.Tensor):
    pass


def pairs_of(images, image=lambda t: t.clone()):
    return [[image(t), number // IPC] for number, t in enumerate(images)]


# What people save instead of a tensor, and the expression that turns the loaded value into the images.
OTHER_CONTENT = {
    "NumPy array": (lambda t: t.numpy(), "a NumPy array of shape (20, 3, 32, 32)", "torch.as_tensor(value).float()"),
    "list": (list, "a list of 20 tensors", "torch.stack(value)"),
    "list of clones": (lambda t: [x.clone() for x in t], "a list of 20 tensors", "torch.stack(value)"),
    "tuple": (tuple, "a tuple of 20 tensors", "torch.stack(value)"),
    "classes in a list": (lambda t: list(t.split(IPC)), "a list of 10 tensors", "torch.cat(value)"),
    "NumPy arrays": (lambda t: [x.numpy() for x in t], "a list of 20 NumPy arrays", "torch.from_numpy"),
    "pairs": (pairs_of, "a list of 20 [image, label] pairs", "sorted(value"),
    "NumPy pairs": (lambda t: pairs_of(t, lambda x: x.numpy()), "a list of 20 [image, label] pairs", "torch.as_tensor(image)"),
    "images and labels": (lambda t: (t, torch.arange(20) // 2), "a tuple of images and labels", "value[0][value[1].argsort"),
    "dict": (
        lambda t: {"images": t, "labels": torch.arange(20) // 2},
        "a dict with the keys 'images', 'labels'", "value['images'][value['labels']",
    ),
    "soft labels": (
        lambda t: {"x": t, "y": torch.eye(10)[torch.arange(20) // 2]}, "a dict with the keys 'x', 'y'", "argmax(1).argsort",
    ),
    "one key": (lambda t: {"data": t}, "a dict with the keys 'data'", "value['data']"),
    "OrderedDict": (lambda t: collections.OrderedDict(x=t), "a dict with the keys 'x'", "value['x']"),
    "dict of arrays": (lambda t: {"x": t.numpy()}, "a dict with the keys 'x'", "torch.from_numpy(value['x'])"),
    "dict by class": (
        lambda t: dict(enumerate(x.clone() for x in t.split(IPC))), "a tensor for each of 10 classes", "torch.cat([",
    ),
    "nested lists": (lambda t: t.tolist(), "a list of", "torch.tensor(value)"),
    "state dict": (lambda t: torch.nn.Linear(3, 4).state_dict(), "a network's state dict", ""),
    "module": (lambda t: torch.nn.Linear(3, 4), "a PyTorch module (Linear)", ""),
    "attribute": (lambda t: with_attribute(t), "a tensor with attributes", "as_subclass(torch.Tensor)"),
    "None": (lambda t: None, "nothing (None)", ""),
    "number": (lambda t: 7, "an int", ""),
    "shape": (lambda t: t.shape, "torch.Size", ""),
    "pictures": (lambda t: [PIL.Image.new("RGB", (2, 2))], "a list of 1, first an object made by PIL.Image.Image", ""),
}  # fmt: skip


def with_attribute(tensor):
    tensor = tensor.clone()
    tensor.note = "mine"
    return tensor


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", OTHER_CONTENT)
def test_another_value_than_a_tensor_is_named_with_the_line_that_converts_it(images, name, protocol, tmp_path):
    make, words, line = OTHER_CONTENT[name]
    data = saved(make(images), pickle_protocol=protocol)
    tensor, codes, message = read(data)
    assert tensor is None and codes == ["T001"], message
    assert words in message and line in message, message
    if not line:
        return
    # The advice itself: what it makes is what was meant.
    converting = re.search(r'torch\.save\((.*), "glyphs\.pt"\), where value = ', message)[1]
    value = torch.load(io.BytesIO(data), weights_only=False)
    torch.save(eval(converting, {"torch": torch, "value": value}), tmp_path / "glyphs.pt")
    converted, findings = read_tensor(tmp_path / "glyphs.pt", GLYPHS, ipc=IPC)
    assert torch.equal(converted, images) and findings == []


@pytest.mark.slow
def test_pairs_of_any_size_are_named(images):
    for count, words in ((2000, "a list of 2,000 [image, label] pairs"), (25_000, "[image, label] pairs")):
        tensor, codes, message = read(saved([[images[0, :, :2, :2].clone(), 1] for _ in range(count)]))
        assert tensor is None and codes == ["T001"] and words in message
    assert "more than" in message


@pytest.mark.parametrize("key", [10**12, "images of the distilled set, after a thousand steps"])
def test_dict_with_a_key_that_is_not_shown_whole_is_given_no_line_with_it(images, key):
    _, codes, message = read(saved({key: images}))
    assert codes == ["T001"] and "a dict with the keys" in message and "value[" not in message


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_sequence_is_named_as_such(empty):
    _, codes, message = read(saved(empty))
    assert codes == ["T001"] and f"The file holds an empty {type(empty).__name__};" in message


def test_array_that_was_not_read_whole_is_named_with_its_shape():
    _, codes, message = read(saved(torch.zeros(400, 3, 32, 32).numpy()))
    assert codes == ["T001"] and "a NumPy array of shape (400, 3, 32, 32)" in message


def test_array_that_was_not_read_whole_is_not_counted(images):
    _, codes, message = read(saved([torch.zeros(400, 3, 32, 32).numpy(), torch.zeros(400).numpy()]))
    assert codes == ["T001"] and "a list of NumPy arrays" in message


def test_dict_that_was_not_read_whole_is_named_with_the_keys_that_were():
    _, codes, message = read(saved({"x": torch.zeros(400, 3, 32, 32).numpy(), "y": 1}))
    assert codes == ["T001"] and "a dict with the keys 'x', ...;" in message


def test_tensors_of_a_strange_shape_are_named_with_it(images):
    _, codes, message = read(saved([images.flatten(1), torch.arange(20)]))
    assert codes == ["T001"] and "a list of 2 tensors, the first of shape (20, 3072)" in message


def test_conversion_of_an_npz_file_does_not_overwrite_it(images, tmp_path):
    numpy.savez(tmp_path / "theirs.npz", images=images.numpy())
    _, (finding,) = read_tensor(tmp_path / "theirs.npz", GLYPHS, ipc=IPC)
    assert finding.code == "T001" and 'numpy.load("theirs.npz")' in finding.message and '"theirs.pt")' in finding.message


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("make", [lambda t: t, torch.nn.Parameter])
def test_a_tensor_of_a_protocol_that_the_scorer_does_not_read_is_named(images, tmp_path, make, protocol):
    data = saved(make(images), pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(data))
    tensor, codes, message = read(data)
    assert tensor is None and codes[-1] == "T010" and f"pickle_protocol={protocol}" in message
    converting = re.search(r'torch\.save\(torch\.load\("glyphs\.pt"(.*)\), "glyphs\.pt"\)', message)
    assert converting and "weights_only=False" in converting[1]


def test_a_protocol_that_pytorch_cannot_load_at_all_is_named(images):
    tensor, codes, message = read(saved(images, pickle_protocol=0))
    assert tensor is None and codes == ["T010"] and "torch.save(tensor," in message


def test_a_class_of_the_authors_own_is_code(images):
    tensor, codes, message = read(saved(images.as_subclass(Subclass)))
    assert tensor is None and codes == ["F006"] and "Subclass" in message


def test_a_byte_order_of_another_machine_is_refused_by_its_name(images):
    swapped = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(images))) as old, zipfile.ZipFile(swapped, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    tensor, codes, message = read(swapped.getvalue())
    assert tensor is None and codes == ["F008"] and "big byte order" in message


def test_a_tensor_expanded_within_a_storage_of_the_right_size_is_refused(images):
    tensor, codes, message = read(saved(images[:1].expand(SHAPE)))
    assert tensor is None and "T006" in codes and "expanded" in message


@pytest.mark.parametrize("content", [pickle.dumps([1, 2]), pickle.dumps(numpy.zeros(3))])
def test_a_bare_pickle_of_plain_values_is_named_with_the_line_that_converts_it(content):
    tensor, codes, message = read(content)
    assert tensor is None and codes == ["T001"] and "pickle.load" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x93NUMPY\x01\x00", "numpy.load"), (b"\x08\0\0\0\0\0\0\0{\"a\":{}}", "safetensors.torch.load_file")],
)  # fmt: skip
def test_a_file_of_another_library_is_named_with_the_line_that_converts_it(content, words):
    tensor, codes, message = read(content)
    assert tensor is None and codes == ["T001"] and words in message


def test_a_program_of_torchscript_is_named():
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    tensor, codes, message = read(program.getvalue())
    assert tensor is None and codes == ["F004"] and "a TorchScript program" in message


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


@pytest.mark.slow
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


def test_directory_at_another_place_than_stated_is_not_read(images):
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


def test_a_dict_with_a_key_of_nested_tuples_is_named_without_hashing_it():
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
    assert tensor is None and codes == ["T001"] and "one of type tuple" in message


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
    assert tensor is None and "not a multiple of the 10 classes" in findings[0].message


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
