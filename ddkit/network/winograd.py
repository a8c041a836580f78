"""The challenge's network on a CPU with a quarter of the multiplications, in chunks that fit the cache.

Its results are those of `ConvNet` with autograd, apart from rounding, although it computes differently in these places:

1. A batch is processed in chunks, by several threads, whose gradients are summed. Instance norm takes its statistics
   from one image and one channel, so no image's result depends on the others; the batch's loss is a mean over images,
   so its gradient is the sum of theirs. Who sums what is fixed by the plan: the same plan gives the same bits.
2. The two 128 -> 128 convolutions, 95 % of the work, use Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray,
   arXiv 1509.09308): with Y = A^T [(G g G^T) * (B^T d B)] A, each 4x4 tile of outputs takes 36 products instead of
   144. That is an identity of polynomials, not an approximation. It is linear in g and in d, so gradients are the
   transposed maps: dU = sum over tiles of V^T dM, dV = dM U^T with dM = A dY A^T, then dg = G^T dU G, dd = B dV B^T.
   Sides that are a multiple of 16 divide into whole tiles. Rounding errors are a few 1e-6 of a tensor's norm.
3. The convolutions' biases are left out: the instance norm that follows subtracts each channel's mean and with it
   any constant. Their gradients are exactly zero (autograd's are rounding errors around zero); weight decay still
   shrinks them, as in the plain way.
4. The backward pass computes the first convolution again instead of keeping its outputs, by the same code and so to
   the same bits.
5. bfloat16, not official: both factors of every convolution's products are rounded to bfloat16, and so are the
   products of the 128 -> 128 convolutions in Winograd's domain; sums within a product, norms, ReLUs, pooling and the
   classifier stay float32. The planes of tiles are half as large, and a processor with bfloat16 instructions
   multiplies twice as many numbers at a time.
6. The plan says who multiplies the tiles with the weights: torch.bmm (MKL, and oneDNN for bfloat16, which uses matrix
   units where there are some) or winograd.cpp, which does without their cost of each call and is faster where the tiles
   fit the cache. In float32 both add up in the same order on most processors, to the same bits.
"""

from __future__ import annotations

import copy
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.challenge import NETWORK_WIDTH
from ddkit.network.convnet import ConvNet
from ddkit.network.kernels import load_library
from ddkit.network.plan import EnginePlan
from ddkit.runtime.threads import thread_pool

_SOURCE = Path(__file__).with_name("winograd.cpp")
_TILE = 4  # outputs a side
_PLANES = 36  # transformed values of a tile, 6 x 6
_TAPS = 27  # of the first convolution
_COLUMN = 32  # floats for that many, as in winograd.cpp
# Planes lie this many bytes further apart than their size, or they would share few sets of the cache.
_BETWEEN_PLANES = 64
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # what the planes hold, by precision

_P, _Q = 0.5**0.5, 2**0.5  # of the points of interpolation: 0, +-P, +-Q and infinity, as in winograd.cpp
_G = torch.tensor([
    [1, 0, 0], [-2 / 3, -2 / 3 * _P, -1 / 3], [-2 / 3, 2 / 3 * _P, -1 / 3],
    [1 / 6, _Q / 6, 1 / 3], [1 / 6, -_Q / 6, 1 / 3], [0, 0, 1],
], dtype=torch.float64)  # fmt: skip
_G_BOTH_WAYS = torch.kron(_G, _G).float()  # (36, 9): G g G^T of a flattened g


def fits(network: nn.Module) -> bool:
    """True if this engine can compute with `network`: the official one in float32, on a CPU, of whole tiles."""
    return (
        type(network) is ConvNet
        and network.image_size % (4 * _TILE) == 0
        and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in network.parameters())
    )


class WinogradEngine:
    """Computes with one ConvNet on the CPU; see the module's text.

    plan.chunk: images that a thread handles at a time. plan.workers: threads.
    Raises CompileError without a C++ compiler.
    """

    def __init__(self, network: ConvNet, plan: EnginePlan) -> None:
        self._network = network
        self._plan = plan
        self._workers = [_Worker(network, plan) for _ in range(plan.workers)]
        self._weights = _Weights(plan)

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients in the parameters' `.grad`."""
        images = self._readable(images)
        weights = self._weights.read(self._network, backward=True)
        batch = _Batch(images, labels, self._network)
        active = self._share_out(len(images), lambda worker, ranges: worker.train(batch, ranges, weights))
        with torch.no_grad():  # sums the workers' gradients, in their order
            total = functools.reduce(_Gradients.add_, [worker.gradients for worker in active])
            gradients = {
                "features.0.weight": total.first.t().reshape(NETWORK_WIDTH, 3, 3, 3),
                "classifier.weight": batch.logit_gradients.t() @ batch.embedding,
                "classifier.bias": batch.logit_gradients.sum(0),
            }
            for place, tiles in zip((4, 8), total.tiles, strict=True):
                # The transpose of `_factor`: (36, in, out) -> (128 out, 128 in, 3, 3).
                taps = (_G_BOTH_WAYS.t() @ tiles.view(_PLANES, -1)).view(3, 3, NETWORK_WIDTH, NETWORK_WIDTH)
                gradients[f"features.{place}.weight"] = taps.permute(3, 2, 0, 1)
            for place, (weight, bias) in zip((1, 5, 9), total.norms, strict=True):
                gradients |= {f"features.{place}.weight": weight, f"features.{place}.bias": bias}
                gradients[f"features.{place - 1}.bias"] = torch.zeros_like(bias)
            for name, parameter in self._network.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
                parameter.grad.copy_(gradients[name])
        return batch.losses.mean()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes) float32, without gradients."""
        images = self._readable(images)
        weights = self._weights.read(self._network, backward=False)
        batch = _Batch(images, None, self._network)
        self._share_out(len(images), lambda worker, ranges: worker.test(batch, ranges, weights))
        return batch.logits

    @torch.no_grad()
    def embed(self, images: Tensor, keep: FeatureMaps | None = None) -> Tensor:
        """(N, 3, S, S) -> (N, F) float32: the network's `embed`, without gradients.

        keep: of N images, filled with what `image_gradients` needs.
        """
        images = self._readable(images)
        if keep is None:
            weights = self._weights.read(self._network, backward=False)
        else:
            keep.weights = weights = (keep.weights or _Weights(self._plan)).read(self._network, backward=True)
        embedding = torch.empty(len(images), self._network.classifier.in_features)
        self._share_out(len(images), lambda worker, ranges: worker.embed(images, embedding, ranges, weights, keep))
        return embedding

    @torch.no_grad()
    def image_gradients(self, images: Tensor, embedding_gradients: Tensor, kept: FeatureMaps) -> Tensor:
        """The backward pass of `embed`: (N, F) gradients of embeddings -> (N, 3, S, S) gradients of images.

        kept: by `embed` of the same images; overwritten, so usable once. The weights are those of that call; none of their
        gradients is computed.
        """
        images, embedding_gradients = self._readable(images), embedding_gradients.float().contiguous()
        weights = kept.weights
        assert weights is not None, "embed has filled the maps"
        gradients, of_batch = torch.empty_like(images), (images, embedding_gradients)
        self._share_out(len(images), lambda worker, ranges: worker.differentiate(*of_batch, gradients, ranges, weights, kept))
        return gradients

    def _readable(self, images: Tensor) -> Tensor:
        """The images as the compiled code reads them, which would read beyond the memory of smaller ones."""
        side = self._network.image_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images must be (N, 3, {side}, {side}), got {tuple(images.shape)}")
        return images.float().contiguous()

    def _share_out(self, n: int, work: Callable[[_Worker, list[_Range]], None]) -> list[_Worker]:
        """Have each worker do its part of `n` images, which depends on nothing but the plan; returns who had one."""
        parts = list(_even_parts(0, n, len(self._workers)))
        jobs = [
            (worker, list(_even_parts(start, end, -(-(end - start) // self._plan.chunk))))
            for worker, (start, end) in zip(self._workers, parts, strict=False)
        ]
        for future in [thread_pool(self._plan.workers).submit(work, *job) for job in jobs]:
            future.result()
        return [worker for worker, _ in jobs]


_Range = tuple[int, int]  # the first image, and the one after the last
_Planes = tuple[Tensor, int]  # of transformed tiles, (36, tiles, 128), and the distance of two planes in values


class _Weights:
    """One step's weights, in the forms that all workers read.

    Their memory is kept for the next step: the system would have to clear the pages of so much each time.
    """

    def __init__(self, plan: EnginePlan) -> None:
        self._plan = plan
        # For blocks 2 and 3: what the inputs' tiles are multiplied by, and in the backward pass the gradients' tiles.
        self.tiles: list[Tensor] = []
        self.tiles_back: list[Tensor] = []

    @torch.no_grad()
    def read(self, network: ConvNet, *, backward: bool) -> _Weights:
        """Take the network's present weights; returns itself."""
        plan = self._plan
        parameters, dtype = dict(network.named_parameters()), _STORED[plan.precision]
        first = parameters["features.0.weight"].reshape(NETWORK_WIDTH, _TAPS)
        self.first = _in_words(first.t(), dtype)
        self.first_rows = _in_words(F.pad(first, (0, _COLUMN - _TAPS)), dtype)
        convolutions = [parameters[f"features.{place}.weight"] for place in (4, 8)]
        self.tiles = _factors(convolutions, plan, self.tiles)
        if backward and plan.products == "own":
            self.tiles_back = _factors([weight.transpose(0, 1) for weight in convolutions], plan, self.tiles_back)
        elif backward:
            self.tiles_back = [tiles.transpose(1, 2) for tiles in self.tiles]
        self.norms = torch.stack([parameters[f"features.{place}.{name}"] for place in (1, 5, 9) for name in ("weight", "bias")])
        self.classifier = network.classifier.weight.detach()
        self.classifier_bias = network.classifier.bias.detach()
        return self


class _Batch:
    """The tensors of a whole batch; each worker reads and writes its own rows."""

    def __init__(self, images: Tensor, labels: Tensor | None, network: ConvNet) -> None:
        n = len(images)
        self.images = images
        self.labels = labels
        self.logits = torch.empty(n, network.num_classes)
        if labels is not None:
            self.losses = torch.empty(n)
            self.embedding = torch.empty(n, network.classifier.in_features)
            self.logit_gradients = torch.empty(n, network.num_classes)


class _Gradients:
    """One worker's sums over its images of a batch; `tiles` in Winograd's domain."""

    def __init__(self) -> None:
        self.first = torch.zeros(_TAPS, NETWORK_WIDTH)
        self.tiles = [torch.zeros(_PLANES, NETWORK_WIDTH, NETWORK_WIDTH) for _ in range(2)]
        self.norms = torch.zeros(3, 2, NETWORK_WIDTH)  # of weight and bias

    def zero_(self) -> None:
        for tensor in (self.first, *self.tiles, self.norms):
            tensor.zero_()

    def add_(self, other: _Gradients) -> _Gradients:
        self.first += other.first
        for own, theirs in zip(self.tiles, other.tiles, strict=True):
            own += theirs
        self.norms += other.norms
        return self


class FeatureMaps:
    """Activations of `n` images for the backward pass: outputs of the convolutions of blocks 2 and 3, statistics of the norms.

    They take 160 KiB for an image of 32 px. The output of block 1, four times as large, is computed again.
    """

    def __init__(self, n: int, side: int) -> None:
        self.values = [torch.empty(n, (side // shrunk) ** 2 * NETWORK_WIDTH) for shrunk in (2, 4)]
        self.statistics = torch.empty(3, n, 2, NETWORK_WIDTH)
        self.weights: _Weights | None = None  # by which they were computed

    def fit(self, images: Tensor) -> bool:
        """True if the maps were made for as many images of this size."""
        return self.values[0].shape == (len(images), (images.shape[-1] // 2) ** 2 * NETWORK_WIDTH)

    def rows(self, start: int, end: int) -> FeatureMaps:
        """The activations of some images, in the same memory."""
        part = copy.copy(self)
        part.values = [values[start:end] for values in self.values]
        part.statistics = self.statistics[:, start:end]
        return part


class _NormData(ctypes.Structure):
    """`NormData` of winograd.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias", "statistics", "weight_gradient", "bias_gradient")]


class _Worker:
    """One thread's memory for a chunk, and the passes over it."""

    def __init__(self, network: ConvNet, plan: EnginePlan) -> None:
        self._library = load(plan.precision)
        self._own_products = plan.products == "own"
        self._dtype = _STORED[plan.precision]
        self._side = network.image_size
        n = plan.chunk
        # Of blocks 2 and 3, each: the inputs' tiles and the products' tiles.
        self._tiles_per_image = [(self._side // shrunk // _TILE) ** 2 for shrunk in (2, 4)]
        self._tiles = [
            torch.zeros(2, self._plane_size(n * tiles) * _PLANES, dtype=self._dtype) for tiles in self._tiles_per_image
        ]
        self._known_planes: dict[tuple[int, int], list[_Planes]] = {}
        self._maps = FeatureMaps(n, self._side)
        self._embedding = torch.zeros(n, network.classifier.in_features)
        self._scratch = torch.zeros(self._library.scratch_floats(self._side))
        self.gradients = _Gradients()

    @torch.no_grad()
    def test(self, batch: _Batch, ranges: list[_Range], weights: _Weights) -> None:
        """Fill these rows of the batch's logits."""
        for start, end in ranges:
            embedding = self._embedding[: end - start]
            self._forward(batch.images[start:end], embedding, weights, self._maps)
            torch.addmm(weights.classifier_bias, embedding, weights.classifier.t(), out=batch.logits[start:end])

    @torch.no_grad()
    def train(self, batch: _Batch, ranges: list[_Range], weights: _Weights) -> None:
        """Fill these rows of the batch's losses, embeddings and gradients of logits, and set `self.gradients`."""
        self.gradients.zero_()
        for start, end in ranges:
            images, embedding = batch.images[start:end], batch.embedding[start:end]
            self._forward(images, embedding, weights, self._maps)
            logits = torch.addmm(weights.classifier_bias, embedding, weights.classifier.t())
            assert batch.labels is not None, "only batches to train on have a loss"
            labels = batch.labels[start:end, None]
            log_probabilities = logits.log_softmax(1)
            batch.losses[start:end] = -log_probabilities.gather(1, labels)[:, 0]
            gradients = log_probabilities.exp_()
            gradients.scatter_add_(1, labels, gradients.new_full(labels.shape, -1.0))
            # The gradients of the mean over the whole batch.
            torch.div(gradients, len(batch.images), out=batch.logit_gradients[start:end])
            n, gradients = end - start, batch.logit_gradients[start:end] @ weights.classifier
            inputs = self._backward_to_first_block(n, gradients, weights, self._maps, self.gradients.tiles)
            self._run("first_backward", *inputs, images, n, self._side, weights.first, self._norm(0, weights, self._maps),
                      self.gradients.first, self._scratch)  # fmt: skip

    @torch.no_grad()
    def embed(
        self, images: Tensor, embedding: Tensor, ranges: list[_Range], weights: _Weights, keep: FeatureMaps | None
    ) -> None:
        """Fill these rows of `embedding` and, where given, of `keep`."""
        for start, end in ranges:
            maps = keep.rows(start, end) if keep else self._maps
            self._forward(images[start:end], embedding[start:end], weights, maps)

    @torch.no_grad()
    def differentiate(
        self, images: Tensor, embedding_gradients: Tensor, image_gradients: Tensor, ranges: list[_Range], weights: _Weights,
        kept: FeatureMaps,
    ) -> None:  # fmt: skip
        """Fill these rows of `image_gradients`."""
        columns = torch.empty(self._side**2, _COLUMN)
        for start, end in ranges:
            n, rows, maps = end - start, slice(start, end), kept.rows(start, end)
            inputs = self._backward_to_first_block(n, embedding_gradients[rows], weights, maps, (None, None))
            self._run("first_backward_to_images", *inputs, images[rows], n, self._side, weights.first, weights.first_rows,
                      self._norm(0, weights, maps), image_gradients[rows], columns, self._scratch)  # fmt: skip

    def _forward(self, images: Tensor, embedding: Tensor, weights: _Weights, maps: FeatureMaps) -> None:
        """Fill `embedding` and `maps`."""
        n, side, run = len(images), self._side, self._run
        inputs, products = self._planes(0, n)
        last_inputs, last_products = self._planes(1, n)
        run("first_forward", images, n, side, weights.first, self._norm(0, weights, maps), *inputs, self._scratch)
        self._multiply(inputs, weights.tiles[0], products)
        run(
            "middle_forward", *products, n, side // 2, self._norm(1, weights, maps), maps.values[0], *last_inputs, self._scratch
        )
        self._multiply(last_inputs, weights.tiles[1], last_products)
        run(
            "last_forward", *last_products, n, side // 4, self._norm(2, weights, maps), maps.values[1], embedding, self._scratch
        )

    def _backward_to_first_block(
        self, n: int, embedding_gradients: Tensor, weights: _Weights, maps: FeatureMaps, add_to: Sequence[Tensor | None]
    ) -> _Planes:
        """The gradients of the tiles that block 2 read, which take their place; `maps` are overwritten.

        add_to: of blocks 2 and 3, the sums of the weights' gradients, None where those are not wanted.
        """
        side, run = self._side, self._run
        inputs, products = self._planes(0, n)
        last_inputs, last_products = self._planes(1, n)
        run("last_backward", embedding_gradients, n, side // 4, self._norm(2, weights, maps), maps.values[1], *last_products,
            self._scratch)  # fmt: skip
        self._multiply_back(last_inputs, last_products, weights.tiles_back[1], add_to[1])
        run("middle_backward", *last_inputs, n, side // 2, self._norm(1, weights, maps), maps.values[0], *products,
            self._scratch)  # fmt: skip
        self._multiply_back(inputs, products, weights.tiles_back[0], add_to[0])
        return inputs

    def _multiply(self, tiles: _Planes, factor: Tensor, products: _Planes) -> None:
        """The products of tiles with the weights."""
        if self._own_products:
            (source, plane), (target, _) = tiles, products
            self._run("multiply", source, target, plane, source.shape[1], factor)
        else:
            torch.bmm(tiles[0], factor, out=products[0])

    def _multiply_back(self, inputs: _Planes, product_gradients: _Planes, factor: Tensor, add_to: Tensor | None) -> None:
        """Add to the gradient of the weights' tiles, if wanted; replace the inputs' tiles by their gradients."""
        (tiles, plane), (gradients, _) = inputs, product_gradients
        if add_to is None:
            pass
        elif self._own_products:
            self._run("multiply_to_weights", tiles, gradients, plane, tiles.shape[1], add_to)
        elif self._dtype == torch.float32:
            torch.baddbmm(add_to, tiles.transpose(1, 2), gradients, out=add_to)
        else:
            add_to += torch.bmm(tiles.transpose(1, 2), gradients)
        self._multiply(product_gradients, factor, inputs)

    def _planes(self, place: int, n: int) -> list[_Planes]:
        """For n images: the inputs' and the products' tiles, (36, tiles, 128) each, and the distance of planes."""
        if (place, n) not in self._known_planes:
            tiles = n * self._tiles_per_image[place]
            plane = self._plane_size(tiles)
            self._known_planes[place, n] = [
                (memory.as_strided((_PLANES, tiles, NETWORK_WIDTH), (plane, NETWORK_WIDTH, 1)), plane)
                for memory in self._tiles[place]
            ]
        return self._known_planes[place, n]

    def _plane_size(self, tiles: int) -> int:
        return tiles * NETWORK_WIDTH + _BETWEEN_PLANES // self._dtype.itemsize

    def _norm(self, place: int, weights: _Weights, maps: FeatureMaps) -> _NormData:
        row = 4 * NETWORK_WIDTH  # bytes
        parameters, gradients = (norms.data_ptr() + 2 * place * row for norms in (weights.norms, self.gradients.norms))
        statistics = maps.statistics[place].data_ptr()
        return _NormData(parameters, parameters + row, statistics, gradients, gradients + row)

    def _run(self, function: str, *arguments: Tensor | int | _NormData) -> None:
        """Call into winograd.cpp; the interpreter is free for other threads meanwhile."""
        getattr(self._library, function)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def load(precision: str = "float32", portable: bool = False) -> ctypes.CDLL:
    """winograd.cpp, compiled for a precision, with the types of its functions' arguments declared.

    portable: without the processor's instructions for bfloat16. Raises CompileError.
    """
    flags = (["-DBFLOAT16"] if precision == "bfloat16" else []) + (["-DPORTABLE"] if portable else [])
    library = load_library(_SOURCE, *flags)
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    planes = (pointer, size)
    signatures: dict[str, tuple[Any, ...]] = {
        "multiply": (pointer, pointer, size, size, pointer),
        "multiply_to_weights": (pointer, pointer, size, size, pointer),
        "first_forward": (pointer, number, number, pointer, _NormData, *planes, pointer),
        "middle_forward": (*planes, number, number, _NormData, pointer, *planes, pointer),
        "last_forward": (*planes, number, number, _NormData, pointer, pointer, pointer),
        "last_backward": (pointer, number, number, _NormData, pointer, *planes, pointer),
        "middle_backward": (*planes, number, number, _NormData, pointer, *planes, pointer),
        "first_backward": (*planes, pointer, number, number, pointer, _NormData, pointer, pointer),
        "first_backward_to_images": (*planes, pointer, number, number, pointer, pointer, _NormData, *(pointer,) * 3),
    }
    for name, types in signatures.items():
        getattr(library, name).argtypes = types
        getattr(library, name).restype = None
    library.scratch_floats.argtypes = (number,)
    library.scratch_floats.restype = size
    library.panel_columns.argtypes = ()
    return library


def _even_parts(start: int, end: int, parts: int) -> Iterator[_Range]:
    """At most `parts` ranges that cover start ... end, none empty, whose sizes differ by one at most."""
    parts = min(parts, end - start)
    for part in range(parts):
        yield start + (end - start) * part // parts, start + (end - start) * (part + 1) // parts


def _factors(weights: Sequence[Tensor], plan: EnginePlan, out: Sequence[Tensor]) -> list[Tensor]:
    """`_factor` of each, in the memory of earlier ones where there are some."""
    return [_factor(weight, plan, out[number] if out else None) for number, weight in enumerate(weights)]


def _factor(weight: Tensor, plan: EnginePlan, out: Tensor | None = None) -> Tensor:
    """(128 out, 128 in, 3, 3) -> U = G g G^T, by which tiles are multiplied: (36, in, out).

    For winograd.cpp in panels of words, (36, panels, 128 / pair, columns, pair).
    """
    dtype, taps = _STORED[plan.precision], weight.permute(2, 3, 1, 0).reshape(9, NETWORK_WIDTH, NETWORK_WIDTH)
    if plan.products == "own":
        shape = (9, NETWORK_WIDTH // _pair(dtype), _pair(dtype), -1, load(plan.precision).panel_columns())
        taps = taps.reshape(shape).permute(0, 3, 1, 4, 2)
    # Nine taps g, in any order of channels -> the 36 values of U = G g G^T, in the same.
    if out is None:
        out = torch.empty(_PLANES, *taps.shape[1:], dtype=dtype)
    if dtype == torch.float32:
        torch.mm(_G_BOTH_WAYS, taps.reshape(9, -1), out=out.view(_PLANES, -1))
    else:
        out.view(_PLANES, -1).copy_(_G_BOTH_WAYS @ taps.reshape(9, -1))
    return out


def _pair(dtype: torch.dtype) -> int:
    """Numbers in a word of 32 bits."""
    return 4 // dtype.itemsize


def _in_words(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, columns) -> (ceil(rows / pair), columns, pair): rows side by side whose products are added up."""
    padded = F.pad(matrix, (0, 0, 0, -len(matrix) % _pair(dtype)))
    return padded.view(-1, _pair(dtype), matrix.shape[1]).transpose(1, 2).to(dtype).contiguous()
