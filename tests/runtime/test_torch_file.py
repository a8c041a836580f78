"""Files of torch.save are read without PyTorch's loader: nothing runs, nothing crashes, no number outside its storage."""

import collections
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch

from ddkit.runtime.torch_file import Call, Global, Pairs, StoredTensor, TorchFile, TorchFileError, load_tensors, names_in_pickle


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def rebuilt(data, **changes):
    """The file with members replaced, by the part of their name after the folder; None removes one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = changes.get(name.partition("/")[2].replace(".", "_").replace("/", "_"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return buffer.getvalue()


def opened(data):
    return TorchFile(io.BytesIO(data))


def pickled_tensor(*, shape=(2, 3), stride=(3, 1), offset=0, count=6, kind="FloatStorage", key="0", location="cpu"):
    """The pickle of a tensor, which its description need not fit."""

    class Storage:
        pass

    class Rebuild:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, kind), key, location, count) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(Rebuild())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
     torch.complex64],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_tensor_of_any_type_and_protocol_is_read_to_the_bit(dtype, protocol):
    tensor = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    file = opened(saved(tensor, pickle_protocol=protocol))
    assert file.protocol == protocol and isinstance(file.value, StoredTensor) and file.value.dtype == dtype
    assert torch.equal(file.load(file.value), tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[1:], lambda t: t.permute(2, 0, 1), lambda t: t[::2, :, 1:], lambda t: t[:1].expand(4, 3, 5),
        lambda t: t[2, 1, 3], lambda t: t[:0], lambda t: t.flatten(),
    ],
)  # fmt: skip
def test_a_view_is_read_with_its_strides_and_offset(view):
    expected = view(torch.randn(4, 3, 5))
    file = opened(saved(expected))
    assert torch.equal(file.load(file.value), expected)
    assert file.value.is_contiguous() == expected.is_contiguous()


def test_the_images_of_one_tensor_take_its_memory_once():
    images = torch.arange(300 * 3072, dtype=torch.uint8).view(300, 3, 32, 32)
    file = opened(saved([*images, images]))
    tracemalloc.start()  # which counts storages, and not what PyTorch allocates
    *read, whole = [file.load(file.stored_tensor(value)) for value in file.value]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * images.nbytes
    assert torch.equal(torch.stack(read), images) and torch.equal(whole, images)
    whole.zero_()
    assert torch.equal(torch.stack(read), images), "they share memory"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": (3, 3)}, "reaches to element 8 of a storage of 6"),
        ({"offset": 1}, "reaches to element 6"),
        ({"stride": (1 << 40, 1)}, "reaches to element"),
        ({"stride": (-3, 1)}, "does not describe a tensor"),
        ({"offset": -1}, "does not describe a tensor"),
        ({"shape": (1 << 70, 3)}, "does not describe a tensor"),
        ({"shape": (2, 3, 1)}, "does not describe a tensor"),
        ({"shape": (2.0, 3)}, "does not describe a tensor"),
        ({"shape": [2, 3]}, "does not describe a tensor"),
        ({"count": 1 << 40}, "holds 24"),
        ({"count": 5}, "describes 20 bytes and holds 24"),
        ({"key": "../0"}, "holds 0"),
        ({"key": "1"}, "holds 0"),
        ({"kind": "DoubleStorage"}, "describes 48 bytes and holds 24"),
    ],
)
def test_a_description_that_contradicts_its_storage_is_refused(changes, reason):
    with pytest.raises(TorchFileError, match=reason) as caught:
        opened(rebuilt(saved(torch.arange(6.0).view(2, 3)), data_pkl=pickled_tensor(**changes)))
    assert caught.value.kind == "damaged"


def test_the_pickle_of_these_tests_is_one_that_pytorch_reads():
    data = rebuilt(saved(torch.arange(6.0)), data_pkl=pickled_tensor())
    assert torch.load(io.BytesIO(data), weights_only=True).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert opened(data).load(opened(data).value).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("order", [b"big", b"middle", b"\xff" * 100])
def test_another_byte_order_is_refused_by_its_name(order):
    with pytest.raises(TorchFileError) as caught:
        opened(rebuilt(saved(torch.zeros(3)), byteorder=order))
    assert caught.value.kind == "byte order" and (caught.value.detail == "big") == (order == b"big")


@pytest.mark.parametrize("order", [None, b""])
def test_a_file_that_names_no_byte_order_is_read_as_older_ones_are(order):
    assert opened(rebuilt(saved(torch.ones(3)), byteorder=order)).value.shape == (3,)


def test_numbers_that_changed_on_the_disk_are_refused():
    data = bytearray(saved(torch.full((1000,), 7.0)))
    data[data.index(struct.pack("<3f", 7, 7, 7))] ^= 1
    with pytest.raises(TorchFileError, match="CRC"):
        opened(bytes(data)).load(opened(bytes(data)).value)


@pytest.mark.parametrize("end", [b"\0", b"PK", bytes(70_000), b"<html>"])
def test_bytes_after_the_end_are_refused(end):
    with pytest.raises(TorchFileError) as caught:
        opened(saved(torch.zeros(3)) + end)
    assert caught.value.kind == "damaged"


@pytest.mark.parametrize("mode", [0o120777, 0o010644, 0o020644, 0o140644])
def test_a_member_marked_as_a_link_a_pipe_or_a_device_is_refused(mode):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(3)))) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode if name.endswith("data/0") else 0o100644) << 16
            new.writestr(info, old.read(name))
    with pytest.raises(TorchFileError, match="link, a pipe or a device"):
        opened(buffer.getvalue())


def test_a_member_that_claims_more_bytes_than_the_file_has_takes_no_memory():
    data = bytearray(saved(torch.zeros(3)))
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(b"data/0"))
    struct.pack_into("<LL", data, at + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    with pytest.raises(TorchFileError, match="claims"):
        opened(bytes(data))


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_code_becomes_a_call_that_nobody_makes(tmp_path, protocol):
    file = opened(saved({"x": Hostile(tmp_path / "canary")}, pickle_protocol=protocol))
    assert Global(os.mkdir.__module__, "mkdir") in file.names
    assert isinstance(file.value, Pairs) and isinstance(file.value.get("x"), Call)
    assert not (tmp_path / "canary").exists()


def test_every_way_to_name_code_in_a_pickle_is_found():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        names = names_in_pickle(io.BytesIO(pickle.dumps(Hostile("never-made"), protocol=protocol)))
        assert any(name.name == "mkdir" for name in names), protocol
    assert names_in_pickle(io.BytesIO(b"(ios\nsystem\n.")) == {Global("os", "system")}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_value_is_read_as_pickle_reads_it(protocol):
    value = [1, -1, 1 << 80, 2.5, "text", b"bytes", None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]] * 3]
    data = pickle.dumps(value, protocol=protocol)
    file = opened(rebuilt(saved(0), data_pkl=data))
    assert file.whole
    if protocol > 2:  # before, bytes were the call of a codec
        assert file.value == value
    else:
        assert file.value[:5] + file.value[6:] == value[:5] + value[6:]


@pytest.mark.slow
def test_a_pickle_of_many_marks_and_values_is_read_in_time_that_grows_with_its_size():
    deep = b"\x80\x02" + b"(" * 200_000 + b"t" * 199_999 + b"."
    assert opened(rebuilt(saved(0), data_pkl=deep)).value is not None


@pytest.mark.slow
def test_of_a_pickle_too_large_to_read_the_outermost_value_is_known():
    file = opened(saved([[torch.zeros(2), 1] for _ in range(12_000)]))
    assert not file.whole and isinstance(file.value, list)


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"", "damaged", "empty"),
        (b"PK", "damaged", "list of members"),
        (b"text", "other", ""),
        (b"\x93NUMPY\x01\0", "other", "a NumPy .npy file"),
        (b"\x10\0\0\0\0\0\0\0{\"x\":{}}", "other", "a safetensors file"),
        (b"<!DOCTYPE html>", "other", "a web page"),
        (pickle.dumps([1, 2]), "other", "a pickle"),
        (saved(torch.zeros(3), _use_new_zipfile_serialization=False), "legacy", "before 1.6"),
        (saved(torch.zeros(3), _use_new_zipfile_serialization=False, pickle_protocol=4), "legacy", "before 1.6"),
        (saved(torch.zeros(3), pickle_protocol=0), "protocol", "0"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named(data, kind, words):
    with pytest.raises(TorchFileError) as caught:
        opened(data)
    assert caught.value.kind == kind and words in f"{caught.value} {caught.value.detail}"


def test_tensors_of_a_dict_are_loaded_by_their_keys(tmp_path):
    tensors = collections.OrderedDict(images=torch.rand(3, 2), labels=torch.arange(3))
    for value in (dict(tensors), tensors):
        torch.save(value, tmp_path / "x.pt")
        images, labels = load_tensors(tmp_path / "x.pt", "images", "labels")
        assert torch.equal(images, tensors["images"]) and torch.equal(labels, tensors["labels"])
    with pytest.raises(TorchFileError, match="has no other"):
        load_tensors(tmp_path / "x.pt", "images", "other")
    torch.save([1], tmp_path / "x.pt")
    with pytest.raises(TorchFileError, match="has no images and labels"):
        load_tensors(tmp_path / "x.pt", "images", "labels")
