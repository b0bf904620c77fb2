"""The bindings: symbols, layouts, round trips, and that a bad shape or file raises instead of ending the process."""

import ctypes
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from granite4v.errors import DeviceError, ModelFileError
from granite4v.ggml.backend import Arena, Backend, find_device, get_data, release_pages, set_data
from granite4v.ggml.declarations import DECLARATIONS
from granite4v.ggml.gguf_file import GgufFile
from granite4v.ggml.graph import Graph, ShapeError, Tensor
from granite4v.ggml.library import lib
from granite4v.ggml.quantize import quantize_rows
from granite4v.ggml.types import TYPE_IDS, TYPES, block_size, row_bytes

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend("cpu", 2)


def run(backend: Backend, build: object, **arrays: np.ndarray) -> np.ndarray:
    graph = Graph(backend, 64)
    inputs = {name: graph.input(name, "F32", *reversed(array.shape)) for name, array in arrays.items()}
    graph.output("out", build(graph, **inputs))  # type: ignore[operator]
    try:
        return graph.run(**arrays)["out"]
    finally:
        graph.close()


def test_every_declared_function_resolves() -> None:
    assert all(hasattr(lib(), declaration.name) for declaration in DECLARATIONS)


def test_our_type_numbers_are_the_librarys() -> None:
    assert {lib().ggml_type_name(number).decode().upper(): number for number in TYPE_IDS.values()} == TYPE_IDS
    for number, block, nbytes in TYPES.values():
        assert (lib().ggml_blck_size(number), lib().ggml_type_size(number)) == (block, nbytes)
    in_use = {number for number in range(llama_cpp.GGML_TYPE_COUNT) if lib().ggml_blck_size(number)}
    assert in_use == set(TYPE_IDS.values())


def test_arrays_make_the_round_trip(backend: Backend) -> None:
    arena = Arena(1)
    tensor = arena.tensor("F32", 3, 4, 5)
    arena.allocate(backend.buffer_type, weights=False)
    values = RNG.standard_normal((5, 4, 3), dtype=np.float32)
    set_data(tensor, values)
    np.testing.assert_array_equal(get_data(tensor), values)
    with pytest.raises(ValueError, match="takes 240 contiguous bytes"):
        set_data(tensor, values[:4])
    arena.close()
    arena.close()


def test_q8_0_block_worked_out_by_hand() -> None:
    """A block is a half-precision scale (largest magnitude / 127) and 32 rounded multiples of it."""
    row = np.zeros((1, 32), np.float32)
    row[0, :3] = [127.0, -63.5, 1.0]
    block = quantize_rows(row, "Q8_0", 1)[0]
    assert block[:2].view(np.float16)[0] == 1.0
    assert block[2:].view(np.int8)[:4].tolist() == [127, -64, 1, 0]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1"])
def test_quantized_bytes_equal_the_gguf_packages_own_code(kind: str) -> None:
    values = RNG.standard_normal((37, 256), dtype=np.float32)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(quantize_rows(values, kind, 2), expected.view(np.uint8))


@pytest.mark.parametrize("kind", ["IQ4_NL", "Q4_K", "Q5_K", "Q6_K"])
def test_threads_do_not_change_bytes(kind: str) -> None:
    values = RNG.standard_normal((3000, 256), dtype=np.float32)
    np.testing.assert_array_equal(quantize_rows(values, kind, 1), quantize_rows(values, kind, 3))


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    assert (block_size("Q4_K"), row_bytes("Q4_K", 512)) == (256, 288)
    with pytest.raises(ValueError, match="4304 elements is not a multiple of Q8_0's block of 32"):
        quantize_rows(np.zeros((1, 4304), np.float32), "Q8_0", 1)


def test_matmul_and_layer_norm_against_numpy(backend: Backend) -> None:
    x, w = RNG.standard_normal((7, 64), dtype=np.float32), RNG.standard_normal((5, 64), dtype=np.float32)
    product = run(backend, lambda g, x, w: g.matmul(w, x), x=x, w=w)
    np.testing.assert_allclose(product, x @ w.T, rtol=1e-5, atol=1e-5)
    normal = run(backend, lambda g, x: g.normalize(x, 1e-6), x=x)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normal, expected, rtol=1e-5, atol=1e-5)


BAD_SHAPES = {
    "matmul": lambda g, a, b: g.matmul(a, b),
    "add": lambda g, a, b: g.add(a, b),
    "concat": lambda g, a, b: g.concat(a, b, 1),
    "reshape": lambda g, a, b: g.reshape(a, 5, 5),
    "view": lambda g, a, b: g.view(a, (4, 9), (16, 16, 16), 0),
    "rows": lambda g, a, b: g.rows(a, b),
    "permute": lambda g, a, b: g.permute(a, 0, 0, 1, 2),
    "attention": lambda g, a, b: g.flash_attention(a, b, b, 1.0),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_shapes_raise(backend: Backend, name: str) -> None:
    graph = Graph(backend, 16)
    a, b = graph.input("a", "F32", 4, 6), graph.input("b", "F32", 5, 6)
    with pytest.raises(ValueError, match=r"F32\[|permute"):
        BAD_SHAPES[name](graph, a, b)
    graph.close()


def test_a_graph_wants_exactly_its_inputs_and_may_be_closed_twice(backend: Backend) -> None:
    graph = Graph(backend, 8)
    graph.output("y", graph.scale(graph.input("x", "F32", 4), 2.0))
    with pytest.raises(ValueError, match=r"takes inputs \['x'\], got \['z'\]"):
        graph.run(z=np.zeros(4, np.float32))
    np.testing.assert_array_equal(graph.run(x=np.ones(4, np.float32))["y"], [2, 2, 2, 2])
    graph.close()
    graph.close()


def test_a_closed_backend_raises_in_python() -> None:
    backend = Backend("cpu", 1)
    backend.close()
    backend.close()
    with pytest.raises(ValueError, match="closed"):
        backend.compute(None)


def test_unknown_and_missing_devices_are_named() -> None:
    with pytest.raises(DeviceError, match="unknown device 'tpu'; known: auto, cpu, cuda, metal"):
        find_device("tpu")
    names = {lib().ggml_backend_dev_name(lib().ggml_backend_dev_get(i)) for i in range(lib().ggml_backend_dev_count())}
    if names == {b"CPU"}:
        with pytest.raises(DeviceError, match="device 'cuda' is not available: this llama-cpp-python offers CPU"):
            find_device("cuda")


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("text", "héllo")
    writer.add_bool("flag", True)
    writer.add_float32("number", 0.5)
    writer.add_array("names", ["a", "bé"])
    writer.add_array("layers", [-1, 0, 3])
    writer.add_tensor("w", np.zeros((3, 32), np.float32), raw_dtype=None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_metadata_and_tensors(small_gguf: Path) -> None:
    with GgufFile.open(small_gguf) as file:
        assert file["general.architecture"] == "clip"
        assert (file["text"], file["flag"], file["number"]) == ("héllo", True, 0.5)
        assert (file["names"], file["layers"]) == (["a", "bé"], [-1, 0, 3])
        assert file.get("absent") is None
        tensor = file.tensors["w"]
        assert (tensor.shape, tensor.type_name, tensor.nbytes) == ((3, 32), "F32", 384)
        assert tensor.offset + tensor.nbytes <= small_gguf.stat().st_size


@pytest.mark.parametrize(
    "keep, message",
    [(0, "is not a GGUF file"), (10, "header is broken or cut short"), (-100, "is cut short: tensor 'w' should end")],
)
def test_a_gguf_cut_short_says_where(small_gguf: Path, keep: int, message: str) -> None:
    small_gguf.write_bytes(small_gguf.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=message):
        GgufFile.open(small_gguf)


def test_a_gguf_with_a_wrong_magic_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ModelFileError, match=r"begins with b'PK\\x03\\x04', expected b'GGUF'"):
        GgufFile.open(path)
    with pytest.raises(ModelFileError, match="cannot read '.*absent.gguf': No such file"):
        GgufFile.open(tmp_path / "absent.gguf")


def test_pad_fills_rows_up_with_zeros(backend: Backend) -> None:
    x = RNG.standard_normal((3, 5, 192), dtype=np.float32)
    np.testing.assert_array_equal(run(backend, lambda g, x: g.pad(x, 256), x=x), np.pad(x, ((0, 0), (0, 0), (0, 64))))
    w = RNG.standard_normal((7, 256), dtype=np.float32)

    def products(graph: Graph, x: Tensor, w: Tensor) -> Tensor:
        """Runs one product after another on the same rows."""
        return graph.add(graph.matmul(w, graph.pad(x, 256)), graph.matmul(w, graph.pad(graph.square(x), 256)))

    expected = (x + x * x) @ w[:, :192].T
    np.testing.assert_allclose(run(backend, products, x=x, w=w), expected, rtol=1e-4, atol=1e-4)
    graph = Graph(backend, 8)
    tensor = graph.input("x", "F32", 192, 5)
    assert graph.pad(tensor, 192) is tensor
    with pytest.raises(ShapeError, match=r"cannot pad F32\[192, 5, 1, 1\] to 128 values"):
        graph.pad(tensor, 128)
    graph.close()


def test_tensor_knows_whether_it_is_contiguous(backend: Backend) -> None:
    graph = Graph(backend, 8)
    x = graph.input("x", "F32", 4, 6, 2)
    assert x.is_contiguous and not graph.permute(x, 1, 0, 2, 3).is_contiguous
    assert isinstance(graph.cont(graph.permute(x, 1, 0, 2, 3)), Tensor)
    graph.close()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
def test_pages_of_every_buffer_of_the_cpu_are_known(backend: Backend) -> None:
    """Also those of rearranged weights: released pages read as zeros."""
    for buffer_type in (backend.buffer_type, *backend.extra_buffer_types()):
        arena = Arena(1)
        tensor = arena.tensor("Q4_0", 1024, 1024)
        arena.allocate(buffer_type, weights=True)
        set_data(tensor, quantize_rows(RNG.standard_normal((1024, 1024), dtype=np.float32), "Q4_0", 1))
        start = tensor.contents.data + (1 << 18)  # far from both ends
        values = np.ctypeslib.as_array(ctypes.cast(start, ctypes.POINTER(ctypes.c_uint8)), (1 << 12,))
        assert values.any()
        release_pages(arena.buffer)
        assert not values.any()
        arena.close()
