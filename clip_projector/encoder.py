"""Encodes images to embeddings: cuts tiles, runs the tower and its projectors on a device, packs the tokens.

Depends on the parts of the configuration (tiling, tower, projector, streams), never on the family.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import get_args

import numpy as np

from granite4v import gguf_keys as keys
from granite4v.choices import VisionCompute
from granite4v.clip_projector.cross_features import STATES, CrossFeatures, canvas_inputs, fill_states, max_nodes
from granite4v.clip_projector.grid_canvas import FramedLayout
from granite4v.clip_projector.images import Image
from granite4v.clip_projector.pixels import normalize, patches
from granite4v.clip_projector.projectors import project
from granite4v.clip_projector.tiles_anyres import cut_view, pack
from granite4v.clip_projector.tiles_canvas import cut_canvas
from granite4v.clip_projector.tower import hidden_states, places
from granite4v.clip_projector.views import TilesLayout, View
from granite4v.clip_projector.weights import FLOATS, Weights
from granite4v.errors import ArgumentError, DeviceError, ModelFileError
from granite4v.families.base import TiledTowerConfig, VisionConfig
from granite4v.families.registry import read_vision
from granite4v.families.towers import N_CHANNELS
from granite4v.families.vision_layout import tensor_kind
from granite4v.ggml import autotune, onednn
from granite4v.ggml.backend import Backend
from granite4v.ggml.gguf_file import GgufFile, TensorInfo, n_weights
from granite4v.ggml.graph import Graph, ShapeError
from granite4v.ggml.kernels import Kernel
from granite4v.ggml.metadata import AGAIN
from granite4v.ggml.slow_weights import warn_if_slow

MAX_TILES_AT_ONCE = 12  # tiles in one graph: bounds its memory; a page on the largest published grid has 11
MAX_GRAPHS = 2  # graphs, each for its number of tiles, that are kept while images are encoded
# graphs whose intermediate results take no more than this together are always kept: building one takes milliseconds
SMALL_NBYTES = 64 << 20
NODES_PER_TILE_AND_LAYER = 64
NODES_PER_PROJECTOR = 200


@dataclass(frozen=True)
class ImageFeatures:
    """The embeddings of one image or video, for the decoder.

    `rows`: float32 `(n_tokens, n_streams, n_embd)`, contiguous, as llama.cpp takes it.
    `layers`: the decoder layer before which each stream is added, ascending.
    `layout`: the tile grid and the window of its tokens without padding (Layout), the frames of a video (VideoLayout),
    or tiles with one run of image tokens each (FramedLayout).
    """

    rows: np.ndarray
    layers: list[int]
    layout: TilesLayout

    @property
    def streams(self) -> np.ndarray:
        """float32 `(n_streams, n_tokens, n_embd)`, a view of `rows`."""
        return self.rows.swapaxes(0, 1)

    @property
    def n_tokens(self) -> int:
        return int(self.rows.shape[0])

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes


class VisionEncoder:
    """The image side of a model, from an mmproj GGUF. Not thread-safe."""

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        n_threads: int | None = None,
        abort: tuple[int, int] | None = None,
        announce: Callable[[], None] | None = None,
        vision_compute: VisionCompute = "file",
        *,
        states_after: bool = False,
    ) -> None:
        """Opens the file and starts the device; weights are read with the first image.

        `device`: 'cpu', 'cuda', 'metal' or 'auto'. `abort`: see `Backend`. `announce` is called if this CPU is measured
        for the first time and that takes longer than a second. `vision_compute`: for values other than 'file' and
        'BF16', matrices of float types are quantized in memory now, which takes seconds; see `quantized_in_memory`.
        `states_after`: a tower that attends over all tiles takes its intermediate states one layer later than the file
        says, as transformers does from 4.46 on. Raises ModelFileError, DeviceError and Aborted.
        """
        self.path = Path(path)
        self._graphs: OrderedDict[int, Graph] = OrderedDict()
        self._states_after = states_after
        try:
            self._open(device, n_threads, abort, announce, vision_compute)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        device: str,
        n_threads: int | None,
        abort: tuple[int, int] | None,
        announce: Callable[[], None] | None,
        vision_compute: VisionCompute,
    ) -> None:
        with GgufFile.open(self.path) as file:
            if file.get(keys.GENERAL_ARCHITECTURE) != keys.ARCH_CLIP:
                raise ModelFileError(
                    f"'{self.path}' has '{keys.GENERAL_ARCHITECTURE}' = {file.get(keys.GENERAL_ARCHITECTURE)!r}, "
                    f"expected {keys.ARCH_CLIP!r}: give the vision file (mmproj-*.gguf)."
                )
            family, config = read_vision(file)
            self.config: VisionConfig = _later_states(config) if self._states_after else config
            names = family.gguf_names(config, {name: info.shape for name, info in file.tensors.items()})
            self.pair_id: str | None = file.get(keys.PAIR_ID)
            self.backend = Backend(device, n_threads, abort)
            self.quantized_as, self.kernels = choose_kernels(file, self.backend, vision_compute, announce)
            if vision_compute == "file":
                matrices = [info for info in own_tensors(file) if len(info.shape) > 1]
                warn_if_slow(self.path, "vision", n_weights(matrices), self.backend)
            self._weights = Weights(file, self.backend, self.kernels, names, self.quantized_as, infos=own_tensors(file))
        if self.quantized_as is not None:  # quantizing may have padded the feed-forward widths
            n_ffn = self._weights.n_rows(f"{keys.BLOCK.format(i=0, part='ffn_up')}.weight")
            self.config = replace(self.config, tower=replace(self.config.tower, intermediate_size=n_ffn))
        width = self.config.text_hidden_size
        self._newline = self._weights.array(keys.IMAGE_NEWLINE, width) if self.config.newline else None
        self._build(1).close()  # raises for the first tensor that is missing or has a wrong shape or type

    def encode(
        self, images: Sequence[Image | View], progress: Callable[[int, int], None] | None = None
    ) -> list[ImageFeatures | CrossFeatures]:
        """Returns the features of each image or view: CrossFeatures for a decoder with cross-attention, else
        ImageFeatures. An Image gets the view it has when it is alone in a prompt. Unless the tower attends over all
        tiles, equal tiles, of one image or several, are computed once.

        `progress` is called repeatedly with (done, 100), in hundredths of the work. Raises Aborted when the abort
        callback asks for it.
        """
        views = [image if isinstance(image, View) else View((image,)) for image in images]
        if isinstance(self.config.tower, TiledTowerConfig):
            return [self._encode_canvas(view, n, len(views), progress) for n, view in enumerate(views)]
        layouts = [view.tiles(self.config) for view in views]
        cuts = [self._cut(view, where) for view, where in zip(views, layouts, strict=True)]
        # pages with blank margins have equal tiles
        unique: dict[bytes, int] = {}
        tiles: list[np.ndarray] = []
        places: list[list[int]] = []
        for image_tiles in cuts:
            place = []
            for tile in image_tiles:
                digest = hashlib.sha256(tile).digest()
                if digest not in unique:
                    unique[digest] = len(tiles)
                    tiles.append(tile)
                place.append(unique[digest])
            places.append(place)
        embeddings = self._encode_tiles(tiles, progress)
        layers = [stream.text_layer for stream in self.config.streams]
        return [
            ImageFeatures(self._pack(embeddings, place, where), layers, where)
            for place, where in zip(places, layouts, strict=True)
        ]

    def _cut(self, view: View, where: TilesLayout) -> np.ndarray:
        if isinstance(where, FramedLayout):
            return cut_canvas(view.images[0].pillow, where.canvas, self.config.tiling)
        return cut_view(view, self.config.tiling)

    def _encode_canvas(
        self, view: View, n_done: int, n_images: int, progress: Callable[[int, int], None] | None
    ) -> CrossFeatures:
        """Computes all tiles of one image in one graph."""
        where, inputs = canvas_inputs(view.images[0].pillow, self.config.tower, self.config.tiling)
        graph = self._graph(where.n_tiles)
        outputs = graph.run(self._between_parts(progress, n_done, 1, n_images), **inputs)
        self._check_finite(outputs)
        graph.release()
        self._weights.release()
        return CrossFeatures(outputs[STATES], where)

    def _encode_tiles(
        self, tiles: list[np.ndarray], progress: Callable[[int, int], None] | None
    ) -> list[list[np.ndarray]]:
        """Returns, for each tile, the embeddings `(tokens_per_tile, n_embd)` of each stream."""
        done: list[list[np.ndarray]] = []
        for first in range(0, len(tiles), MAX_TILES_AT_ONCE):
            batch = np.stack(tiles[first : first + MAX_TILES_AT_ONCE])
            pixels = patches(normalize(batch, self.config.tiling), self.config.tower.patch_size)
            graph = self._graph(len(batch))
            between = self._between_parts(progress, len(done), len(batch), len(tiles))
            outputs = graph.run(between, pixels=pixels, **places(self.config.tower))
            self._check_finite(outputs)
            graph.release()  # the outputs are copies, and the text weights may be read next
            streams = [
                outputs[f"stream.{p}"].reshape(len(batch), self.config.tokens_per_tile, -1)
                for p in range(len(self.config.streams))
            ]
            done += [[stream[t] for stream in streams] for t in range(len(batch))]
        self._weights.release()
        return done

    def _between_parts(
        self, progress: Callable[[int, int], None] | None, n_done: int, n_now: int, n_tiles: int
    ) -> Callable[[int, int], None]:
        """Returns the callback between the parts of the graph that computes the next `n_now` of `n_tiles` tiles. It
        reports progress in hundredths of the whole work, and releases the weights read so far, so that all weights are
        never in memory at once."""

        def between(part: int, n_parts: int) -> None:
            self._weights.release()
            if progress is not None:
                progress(100 * (n_done * n_parts + n_now * part) // (n_tiles * n_parts), 100)

        return between

    def _check_finite(self, outputs: Mapping[str, np.ndarray]) -> None:
        for name, values in outputs.items():
            if not math.isfinite(float(values.sum(dtype="float64"))):
                raise ModelFileError(
                    f"'{self.path}' makes image embeddings ({name}) that are not finite numbers, so its weights are "
                    f"damaged; {AGAIN}."
                )

    def _graph(self, n_tiles: int) -> Graph:
        """Returns the graph for a number of tiles; keeps it for later images."""
        if n_tiles in self._graphs:
            self._graphs.move_to_end(n_tiles)
            return self._graphs[n_tiles]
        graph = self._build(n_tiles)
        self._graphs[n_tiles] = graph
        self._drop_graphs(MAX_GRAPHS)
        return graph

    def _build(self, n_tiles: int) -> Graph:
        graph = Graph(self.backend, self._max_nodes(n_tiles))
        try:
            self._fill(graph, n_tiles)
        except BaseException as error:
            graph.close()
            if isinstance(error, ShapeError):
                raise ModelFileError(f"'{self.path}' has tensors that do not fit together: {error}; {AGAIN}.") from None
            raise
        return graph

    def _max_nodes(self, n_tiles: int) -> int:
        tower = self.config.tower
        if isinstance(tower, TiledTowerConfig):
            return max_nodes(tower)
        n_layers = tower.num_hidden_layers + 2
        return NODES_PER_TILE_AND_LAYER * n_tiles * n_layers + NODES_PER_PROJECTOR * len(self.config.streams)

    def _fill(self, graph: Graph, n_tiles: int) -> None:
        config, tower = self.config, self.config.tower
        if isinstance(tower, TiledTowerConfig):
            fill_states(graph, self._weights, tower, config.text_hidden_size, n_tiles)
            return
        pixels = graph.input("pixels", "F32", N_CHANNELS * tower.patch_size**2, tower.grid_side**2, n_tiles)
        wanted = {state for stream in config.streams for state in stream.hidden_states}
        together = not self.backend.is_cpu
        states = hidden_states(graph, self._weights, tower, pixels, wanted, together=together)
        for p, embeddings in enumerate(project(graph, self._weights, config, states)):
            graph.output(f"stream.{p}", embeddings)

    def _pack(self, embeddings: list[list[np.ndarray]], place: list[int], where: TilesLayout) -> np.ndarray:
        """Packs the rows `(n_tokens, n_streams, n_embd)` of one image, stream by stream. `place`: the index in
        `embeddings` of each of its tiles."""
        n_streams, n_embd = len(self.config.streams), self.config.text_hidden_size
        n_rows = where.n_rows if isinstance(where, FramedLayout) else where.n_tokens
        rows = np.empty((n_rows, n_streams, n_embd), dtype=np.float32)
        for s in range(n_streams):
            tiles = [embeddings[t][s] for t in place]
            if isinstance(where, FramedLayout):
                np.concatenate(tiles, out=rows[:, s])
            else:
                pack(tiles, self._newline, where, rows[:, s])
        return rows

    def release(self) -> bool:
        """Frees the memory of intermediate results if they are large, until the next image. Returns whether it freed
        any."""
        return self._drop_graphs(0)

    def _drop_graphs(self, n_kept: int) -> bool:
        """Closes least recently used graphs until `n_kept` are left, or the rest takes at most SMALL_NBYTES. Returns
        whether it closed any."""
        n_before = len(self._graphs)
        while len(self._graphs) > n_kept and sum(graph.nbytes for graph in self._graphs.values()) > SMALL_NBYTES:
            self._graphs.popitem(last=False)[1].close()
        return len(self._graphs) < n_before

    def close(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()
        for part in ("_weights", "backend"):
            if hasattr(self, part):
                getattr(self, part).close()

    def __enter__(self) -> VisionEncoder:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def choose_kernels(
    file: GgufFile, backend: Backend, vision_compute: VisionCompute, announce: Callable[[], None] | None = None
) -> tuple[str | None, dict[str, Kernel]]:
    """Returns the type to which matrices are quantized in memory (see `quantized_in_memory`), and the kernel for each
    weight type that does not use the plain one. Reads headers only; measures kernels on the first call on a machine."""
    quantized_as = quantized_in_memory(file, backend, vision_compute, announce)
    matrices = [info for info in own_tensors(file) if len(info.shape) > 1]
    if quantized_as is not None:
        matrices = [replace(i, type_name=quantized_as) if _is_float_matrix(i) else i for i in matrices]
    rounding = vision_compute == "BF16"
    kernels = autotune.vision_kernels(backend, n_weights(matrices), announce, rounding=rounding)
    if quantized_as is not None:
        kernels |= dict([autotune.int8_kernel(backend, announce, [quantized_as])])
    return quantized_as, kernels


def quantized_in_memory(
    file: GgufFile, backend: Backend, vision_compute: VisionCompute, announce: Callable[[], None] | None = None
) -> str | None:
    """Returns the type to which matrices of float types are quantized: `vision_compute` itself, or for 'int8' the
    fastest 8-bit type on this machine.

    None for 'file', for 'BF16' (factors are rounded to it during multiplication), and for a file without matrices of
    float types. `announce`: as for `VisionEncoder`. Raises DeviceError for a GPU, which has its own kernels, and for a
    CPU without support; ArgumentError for a value that `VisionCompute` does not list.
    """
    if vision_compute not in get_args(VisionCompute):
        raise ArgumentError(f"vision_compute is {vision_compute!r:.40}; expected one of {get_args(VisionCompute)}.")
    if vision_compute == "file":
        return None
    if not backend.is_cpu:
        raise DeviceError(
            f"vision_compute '{vision_compute}' is for the CPU, but the image side is computed on '{backend.name}'; "
            "leave it out, or use '--device cpu'."
        )
    if vision_compute == "BF16":
        if not onednn.multiplies_bfloat16():
            raise DeviceError(
                f"vision_compute 'BF16' needs a CPU with AVX-512 BF16 or AMX, and oneDNN ({onednn.version() or 'not'} "
                "installed): pip install 'granite4v[onednn]'; or use 'int8'."
            )
        return None
    if not any(map(_is_float_matrix, own_tensors(file))):
        return None
    return autotune.int8_kernel(backend, announce)[0] if vision_compute == "int8" else vision_compute


def own_tensors(file: GgufFile) -> list[TensorInfo]:
    """The tensors of the image side; a vision file may also contain decoder layers."""
    return [info for name, info in file.tensors.items() if not name.startswith(keys.CROSS_PREFIX)]


def _later_states(config: VisionConfig) -> VisionConfig:
    if not isinstance(config.tower, TiledTowerConfig):
        return config
    states = tuple(state + 1 for state in config.tower.intermediate_states)
    return replace(config, tower=replace(config.tower, intermediate_states=states))


def _is_float_matrix(info: TensorInfo) -> bool:
    return info.type_name in FLOATS and tensor_kind(info.name, info.shape) == "matrix"
