"""Reading a submitted tensor, or saying what the file holds instead and how to convert it. Nothing in a file is executed."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.errors import first_few
from ddkit.runtime.files import why_not_a_file
from ddkit.runtime.torch_file import (
    Call,
    Global,
    Pairs,
    StoredTensor,
    TorchFile,
    TorchFileError,
    as_dict,
    calls,
    names_in_pickle,
)
from ddkit.sets.findings import Finding

_READABLE_PROTOCOLS = (2, 3)  # of pickle, by PyTorch's loader as it is called since version 2.6
# What plain containers, tensors and arrays need of each module. To name any of it is not to run the author's code.
_OF_DATA = {
    **dict.fromkeys(("builtins", "__builtin__"), "set frozenset slice complex range xrange bytearray list dict tuple object"),
    "collections": "OrderedDict defaultdict deque Counter",
    "_codecs": "encode",
    **dict.fromkeys(("copyreg", "copy_reg"), "_reconstructor"),
    "numpy": "ndarray dtype",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct scalar"),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer"),
    "torch": "Size device Tensor per_tensor_affine per_channel_affine",
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch.storage": "UntypedStorage _load_from_bytes",
    "torch._tensor": "_rebuild_from_type_v2",
}


def read_tensor(path: str | os.PathLike[str], spec: DatasetSpec, *, ipc: int | None) -> tuple[Tensor | None, list[Finding]]:
    """Read a submitted tensor, or say why not.

    spec: the dataset that the images should be of. ipc: images per class that there must be; None for any whole number.
    Returns the float32 tensor (N, 3, S, S), or None if the findings hold an error that forbids reading it, and the
    findings F001, F004-F008 and T001-T008, T010.
    """
    where = Path(path).name
    try:
        if problem := why_not_a_file(path):
            return None, [Finding("error", "F004", f"{path} {problem}.", where)]
        with open(path, "rb") as file:
            return _read(file, where, spec, ipc)
    except FileNotFoundError:
        return None, [Finding("error", "F001", f"{path} does not exist.", where)]
    except OSError as error:
        return None, [Finding("error", "F004", f"{path} cannot be read: {error.strerror or error}.", where)]


def read_tensor_bytes(data: bytes, where: str, spec: DatasetSpec, *, ipc: int | None) -> tuple[Tensor | None, list[Finding]]:
    """Like `read_tensor`, for a file's bytes in memory."""
    return _read(io.BytesIO(data), where, spec, ipc)


def describe_tensor(tensor: Tensor | StoredTensor, spec: DatasetSpec, where: str, *, ipc: int | None) -> list[Finding]:
    """Findings T002, T003, T005 and T007 on a tensor's type, shape and layout. The values are not looked at."""
    findings = []
    if tensor.dtype != torch.float32:
        findings.append(_not_float32(tensor.dtype, spec, where))
    if problem := _shape_problem(tuple(tensor.shape), spec, ipc):
        findings.append(Finding("error", "T003", problem, where))
    if tensor.requires_grad:
        message = "The tensor requires gradients, which the scorer's training would compute. Save tensor.detach()."
        findings.append(Finding("warning", "T005", message, where))
    if not tensor.is_contiguous():
        message = "The tensor's memory is not in the order of its dimensions. Save tensor.contiguous()."
        findings.append(Finding("warning", "T007", message, where))
    return findings


def _not_float32(dtype: torch.dtype, spec: DatasetSpec, where: str) -> Finding:
    advice = "Save tensor.float()."
    if not (dtype.is_floating_point or dtype.is_complex):
        mean, std = (f"torch.tensor({list(values)}).view(3, 1, 1)" for values in (spec.mean, spec.std))
        advice = f"Normalize the pixels, with 255 for white: (tensor.float() / 255 - {mean}) / {std}"
    name = str(dtype).removeprefix("torch.")
    return Finding("error", "T002", f"The tensor is {name}; the scorer takes normalized float32 values. {advice}", where)


def _read(file: BinaryIO, where: str, spec: DatasetSpec, ipc: int | None) -> tuple[Tensor | None, list[Finding]]:
    try:
        opened = TorchFile(file)
        findings, stored = _look_inside(opened, where, spec, ipc)
        if stored is None or any(finding.level == "error" for finding in findings):
            return None, findings
        return opened.load(stored), findings
    except TorchFileError as error:
        return None, [unreadable(error, file, where)]


def _look_inside(
    opened: TorchFile, where: str, spec: DatasetSpec, ipc: int | None
) -> tuple[list[Finding], StoredTensor | None]:
    if foreign := foreign_names(opened.names):
        return [runs_code(foreign, where)], None
    stored = opened.value
    if not isinstance(stored, StoredTensor):
        return [_not_a_tensor(opened, where, spec)], None
    findings = describe_tensor(stored, spec, where, ipc=ipc)
    if opened.protocol not in _READABLE_PROTOCOLS:
        findings.append(_of_other_protocol(str(opened.protocol), where))
    if stored.location != "cpu":
        message = (
            f"The tensor was saved on {stored.location}: loading it fails on a machine without such a device. "
            f'Save it from the CPU: torch.save(tensor.cpu(), "{where}").'
        )
        findings.append(Finding("error", "T004", message, where))
    needed, held = stored.numel * stored.dtype.itemsize, opened.stored_bytes
    if stored.overlaps() or held != needed:
        kind = "a view" if held > needed else "expanded from fewer numbers"
        message = (
            f"The tensor is {kind}: its elements take {needed:,} bytes, and {held:,} were saved with it. "
            f'Save a copy: torch.save(tensor.clone(memory_format=torch.contiguous_format), "{where}").'
        )
        findings.append(Finding("error", "T006", message, where))
    return findings, stored


def unreadable(error: TorchFileError, file: BinaryIO, where: str) -> Finding:
    """The finding for a file that torch.save did not write as it is."""
    reason, detail = str(error), error.detail
    if error.kind == "legacy":
        message = (
            "The file is in torch.save's legacy format, from before PyTorch 1.6. "
            f'If you trust it, save it again: torch.save(torch.load("{where}", weights_only=False), "{where}").'
        )
        return Finding("error", "F007", message, where)
    if error.kind == "byte order":
        order = detail if detail in ("big", "little") else repr(detail)
        message = (
            f"The file says that its numbers are in {order} byte order, which is not this machine's. Load it where it was "
            f'made, and save it on a machine with an x86 or ARM processor: torch.save(tensor, "{where}").'
        )
        return Finding("error", "F008", message, where)
    if error.kind == "protocol":
        return _of_other_protocol(detail, where)
    if error.kind == "damaged":
        return Finding("error", "F005", f"The file is damaged: {reason}. Save or copy it again.", where)
    if detail == "a pickle":
        return _bare_pickle(file, where)
    converted = Path(where).with_suffix(".pt").name
    converting = {
        "a NumPy .npy file": f'torch.save(torch.from_numpy(numpy.load("{where}")).float(), "{converted}")',
        "a NumPy .npz file": f'torch.save(torch.from_numpy(numpy.load("{where}")["KEY"]).float(), "{converted}")',
        "a safetensors file": f'torch.save(safetensors.torch.load_file("{where}")["KEY"], "{converted}")',
    }
    if line := converting.get(detail):
        return Finding("error", "T001", f"The file is {detail}. Convert it: {line}", where)
    named = f" It looks like {detail}." if detail else ""
    return Finding("error", "F004", f"torch.save did not write this file.{named} Save it: torch.save(tensor, PATH).", where)


def _of_other_protocol(protocol: str, where: str) -> Finding:
    line = f'If you trust it: torch.save(torch.load("{where}", weights_only=False).detach().clone(), "{where}").'
    message = (
        f"The tensor was saved with pickle_protocol={protocol}, which torch.load cannot read in the way the scorer calls it. "
        + (line if int(protocol) > 3 else f'Save it without that option: torch.save(tensor, "{where}").')
    )
    return Finding("error", "T010", message, where)


def _bare_pickle(file: BinaryIO, where: str) -> Finding:
    try:
        foreign = foreign_names(names_in_pickle(file))
    except TorchFileError as error:
        return Finding("error", "F006", f"The file is a bare pickle, and damaged: {error}. Use torch.save.", where)
    if foreign:
        return runs_code(foreign, where)
    message = (
        "The file was written by pickle.dump, and torch.load does not read it. If you trust it, convert it: "
        f'torch.save(torch.as_tensor(pickle.load(open("{where}", "rb"))).float(), "{where}")'
    )
    return Finding("error", "T001", message, where)


def runs_code(foreign: Sequence[str], where: str) -> Finding:
    message = (
        f"The file is a pickle that refers to {first_few(foreign)}, so loading it without restrictions may run code. "
        f'It was not executed. Save only the tensor: torch.save(tensor, "{where}").'
    )
    return Finding("error", "F006", message, where)


def foreign_names(names: Sequence[Global] | frozenset[Global]) -> list[str]:
    """Those of a pickle's names that neither a tensor nor a plain container of tensors and arrays needs."""
    return sorted(str(name) for name in names if not _is_of_data(name))


def _is_of_data(name: Global) -> bool:
    module, called = name.module, name.name
    return (
        called in _OF_DATA.get(module, "").split()
        or (module == "torch" and (called.endswith("Storage") or isinstance(getattr(torch, called, None), torch.dtype)))
        or (module == "torch._utils" and called.startswith("_rebuild_"))
        or (module.startswith("PIL.") and called.endswith(("Image", "ImageFile")))
        or (module.startswith(("torch.nn.modules.", "torchvision.tv_tensors.", "numpy.dtypes")) and called.isidentifier())
    )


def _not_a_tensor(opened: TorchFile, where: str, spec: DatasetSpec) -> Finding:
    """T001 or T008: what the file holds, with the line of Python that converts it."""
    value = opened.value
    of_call = value.function if isinstance(value, Call) else value
    name = of_call.name if isinstance(of_call, Global) else ""
    if name == "_rebuild_tensor_v3":  # of a type that came late, such as uint16, which the pickle names
        named = [getattr(torch, each.name, None) for each in opened.names if each.module == "torch"]
        return _not_float32(next((each for each in named if isinstance(each, torch.dtype)), torch.uint16), spec, where)
    for word, kind, plain in (
        ("_rebuild_sparse_tensor", "sparse", "tensor.to_dense()"),
        ("_rebuild_qtensor", "quantized", "tensor.dequantize()"),
        ("_rebuild_nested_tensor", "nested", "tensor.to_padded_tensor(0.0)"),
        ("_rebuild_meta_tensor_no_storage", "on the device 'meta', without numbers", "the computed tensor"),
    ):
        if name == word:
            message = f'The tensor is {kind}. Save a plain one: torch.save({plain}, "{where}").'
            return Finding("error", "T008", message, where)
    described, line = describe_value(opened, value, spec)
    advice = f'Convert it: torch.save({line}, "{where}")' if line else f'Save one bare tensor: torch.save(images, "{where}")'
    loading = f', where value = torch.load("{where}", weights_only=False) if you trust the file' if "value" in line else ""
    return Finding("error", "T001", f"The file holds {described}; the scorer takes one bare tensor. {advice}{loading}.", where)


def describe_value(opened: TorchFile, value: Any, spec: DatasetSpec) -> tuple[str, str]:
    """A value in words, and the expression that makes the challenge's tensor of it; "" if there is none."""
    if (shape := _array_shape(value, opened.rest)) is not None:
        return "a NumPy array" + (f" of shape {shape[:6]}" if shape else ""), "torch.as_tensor(value).float().contiguous()"
    if calls(value, "torch._tensor", "_rebuild_from_type_v2"):
        return "a subclass of torch.Tensor, or a tensor with attributes", "value.as_subclass(torch.Tensor).detach().clone()"
    if (entries := as_dict(value)) is not None:
        return _described_dict(opened, entries, spec)
    if isinstance(value, (list, tuple)):
        return _described_sequence(opened, value, spec)
    if isinstance(value, Call):
        if isinstance(value.function, Global) and value.function.module.startswith("torch.nn.modules."):
            return f"a PyTorch module ({value.function.name}), which is a network and not images", ""
        if value.function is None:
            return "a bare storage", "torch.tensor(value).reshape(SHAPE)"
        return f"an object made by {value.function}"[:100], ""
    if isinstance(value, Global):
        return f"the name {value}"[:100], ""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" if value is not None else "nothing (None)", ""


def _described_dict(opened: TorchFile, entries: Pairs, spec: DatasetSpec) -> tuple[str, str]:
    items = entries.items or list(zip(opened.rest[::2], opened.rest[1::2], strict=False))
    if not opened.whole:  # the pickle may have ended within an array, whose parts are no keys
        ends = [place for place, (_, value) in enumerate(items, 1) if _array_shape(value, []) is not None]
        items = items[: ends[0]] if ends else items
    tensors = {key: t for key, value in items if isinstance(key, (str, int)) and (t := _tensor(opened, value)) is not None}
    keys = ", ".join(_shown_key(key) for key, _ in items[:5]) + (", ..." if len(items) > 5 or not opened.whole else "")
    described = f"a dict with {'the keys ' + keys if keys else 'no keys'}"
    weights = [key for key in tensors if isinstance(key, str) and key.rpartition(".")[2] in ("weight", "bias", "running_mean")]
    if weights:
        return f"a network's state dict with the keys {keys}, which are weights and not images", ""
    if len(tensors) >= spec.num_classes and all(isinstance(key, int) for key in tensors):
        return (
            f"a dict with a tensor for each of {len(tensors)} classes",
            "torch.cat([value[label] for label in sorted(value)])",
        )
    # The line of Python names keys, so that it takes those only that are shown as they are.
    tensors = {key: tensor for key, tensor in tensors.items() if _is_short(key)}
    images = next((key for key, tensor in tensors.items() if tensor.shape[1:] == spec.image_shape), None)
    if images is None:
        images = next((key for key, tensor in tensors.items() if len(tensor.shape) == 4), None)
    if images is None:
        arrays = (key for key, value in items if _is_short(key) and len(_array_shape(value, []) or ()) == 4)
        return described, next((f"torch.from_numpy(value[{_shown_key(key)}]).float()" for key in arrays), "")
    rows = f"value[{_shown_key(images)}]"
    count = tensors[images].shape[:1]
    for key, tensor in tensors.items():
        if key != images and (tensor.shape == count and not tensor.dtype.is_floating_point):
            return described, f"{rows}[value[{_shown_key(key)}].argsort(stable=True)]"
        if key != images and tensor.shape == (*count, spec.num_classes):
            return described, f"{rows}[value[{_shown_key(key)}].argmax(1).argsort(stable=True)]"
    return described, rows


def _described_sequence(opened: TorchFile, value: Sequence[Any], spec: DatasetSpec) -> tuple[str, str]:
    kind, whole = type(value).__name__, opened.whole
    items = list(value) or opened.rest
    if whole and not items:
        return f"an empty {kind}", ""
    count = f"{len(items):,}" if whole else f"more than {len(items):,}"
    first = items[0] if items else None
    tensor = _tensor(opened, first)
    second = _tensor(opened, items[1]) if len(items) == 2 else None
    if tensor is not None and second is not None and len(tensor.shape) == 4 and tensor.shape[:1] == second.shape:
        return f"a {kind} of images and labels", "value[0][value[1].argsort(stable=True)]"
    if tensor is not None and len(tensor.shape) in (3, 4):
        return f"a {kind} of {count} tensors", f"torch.{'stack' if len(tensor.shape) == 3 else 'cat'}(value)"
    if tensor is not None:
        return f"a {kind} of {count} tensors, the first of shape {tensor.shape[:6]}", ""
    if _array_shape(first, []) is not None:
        arrays = f"{count} NumPy arrays" if whole else "NumPy arrays"  # the parts of one are not connected, and not counted
        return f"a {kind} of {arrays}", "torch.stack([torch.from_numpy(image) for image in value]).float()"
    if isinstance(first, (list, tuple)) and len(first) == 2:
        array, tensor = _array_shape(first[0], []), _tensor(opened, first[0])
        image = "torch.as_tensor(image)" if array is not None else "image" if tensor is not None else ""
        if image:
            by_class = "sorted(value, key=lambda pair: int(pair[1]))"
            return f"a {kind} of {count} [image, label] pairs", f"torch.stack([{image} for image, label in {by_class}]).float()"
    if isinstance(first, (int, float, list)) and not isinstance(first, bool):
        return f"a {kind} of {count} {'lists' if isinstance(first, list) else 'numbers'}", "torch.tensor(value)"
    if not isinstance(first, (Call, str)):
        return f"a {kind} of {count}", ""
    return f"a {kind} of {count}, first {describe_value(opened, first, spec)[0]}", ""


def _tensor(opened: TorchFile, value: Any) -> StoredTensor | None:
    """The tensor that a part of a file describes; None for any other part and for a damaged description."""
    try:
        return opened.stored_tensor(value)
    except TorchFileError:
        return None


def _array_shape(value: Any, rest: Sequence[Any]) -> tuple[int, ...] | None:
    """The shape of a NumPy array or number, () if it is not known; None for anything else.

    rest: of a pickle that was not read to its end, which the bytes of an array of a usual size are not.
    """
    function = value.function if isinstance(value, Call) else value
    if not isinstance(function, Global) or function.name not in ("_reconstruct", "_frombuffer", "ndarray", "scalar"):
        return None
    described = (value.state, tuple(rest), value.arguments) if isinstance(value, Call) else (tuple(rest),)
    parts = next((parts for parts in described if isinstance(parts, tuple) and parts), ())
    shapes = (part for part in parts if isinstance(part, tuple) and part and all(type(size) is int for size in part))
    return next(shapes, ())


def _shape_problem(shape: tuple[int, ...], spec: DatasetSpec, ipc: int | None) -> str:
    side, classes = spec.image_size, spec.num_classes
    rows = f"{ipc * classes:,}" if ipc is not None else f"a multiple of {classes}"
    wanted = f"({rows}, 3, {side}, {side})"
    if len(shape) == 4 and shape[1:] == (side, side, 3):
        return f"The shape is {shape}: channels last. The scorer takes {wanted}: save tensor.permute(0, 3, 1, 2).contiguous()."
    if len(shape) != 4 or shape[1:] != spec.image_shape:
        return f"The shape is {shape}; for {spec.name} it must be {wanted}."
    if ipc is None and (shape[0] == 0 or shape[0] % classes):
        return f"The tensor has {shape[0]:,} rows, which is not a multiple of the {classes} classes of {spec.name}."
    if ipc is not None and shape[0] != ipc * classes:
        per_class = f" ({shape[0] // classes} a class)" if shape[0] % classes == 0 else ""
        return f"The tensor has {shape[0]:,} rows{per_class}; it must have {rows}, {ipc} for each of {classes} classes."
    return ""


def _is_short(key: Any) -> bool:
    return len(key) <= 40 if isinstance(key, str) else type(key) is int and abs(key) < 10**9


def _shown_key(key: Any) -> str:
    """A stranger's key, which may be of any size and depth, in a few letters."""
    if _is_short(key):
        return repr(key)
    return f"{key[:40]!r}" if isinstance(key, str) else f"one of type {type(key).__name__}"
