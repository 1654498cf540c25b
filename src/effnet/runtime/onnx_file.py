"""The last layers of an ONNX file, read without the package onnx, and its last feature map as an output.

The file is a protobuf message: fields one after another, each a number, a type and a value, which may be a message
itself. Where a message occurs twice, as the graph does in a file with more bytes at its end, the fields of both count.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArtifactError
from effnet.runtime.session import Linear

# numbers of fields in onnx.proto
GRAPH = 7  # of a model
NODE, INITIALIZER, GRAPH_OUTPUT = 1, 5, 12  # of a graph
INPUT, OPERATOR = 1, 4  # of a node
NAME, RAW = 8, 9  # of a tensor
VALUE_NAME, VALUE_TYPE, TENSOR_TYPE, ELEMENT, SHAPE, DIM = 1, 2, 1, 1, 2, 1  # of a value: its name, its type
FLOAT = 1  # float32
MORE = 128  # added to a byte if the number continues in the next one

Value = int | memoryview


def with_maps(content: bytes) -> bytes:
    """The file with the input of its last average, the last feature map, as a second output.

    Raises:
        ArtifactError: it is not such a file.
    """
    inputs = _last_inputs(content, "GlobalAveragePool")
    shape = _field(SHAPE, 4 * _field(DIM, b""))  # any
    kind = _field(VALUE_TYPE, _field(TENSOR_TYPE, bytes([ELEMENT << 3, FLOAT]) + shape))
    return content + _field(GRAPH, _field(GRAPH_OUTPUT, _field(VALUE_NAME, inputs[0].encode()) + kind))


def read_linear(content: bytes) -> Linear:
    """The weight and the bias of the last Gemm.

    Raises:
        ArtifactError: it is not a file that effnet exports.
    """
    wanted, found = _last_inputs(content, "Gemm")[1:], dict[str, NDArray[np.float32]]()
    for graph in _values(memoryview(content), GRAPH):
        for tensor in _values(graph, INITIALIZER):
            name = next(map(_text, _values(tensor, NAME)), "")
            if name in wanted:
                found[name] = np.frombuffer(next(_values(tensor, RAW)), "<f4").astype(np.float32)
    weight, bias = (found[name] for name in wanted)
    return Linear(weight.reshape(len(bias), -1), bias)


def _last_inputs(content: bytes, operator: str) -> list[str]:
    """The names of the inputs of the last node of a kind."""
    found: list[str] = []
    try:
        for graph in _values(memoryview(content), GRAPH):
            for node in _values(graph, NODE):
                if operator in map(_text, _values(node, OPERATOR)):
                    found = [*map(_text, _values(node, INPUT))]
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise ArtifactError("the ONNX file is damaged: export the model again") from error
    if not found:
        raise ArtifactError(f"the ONNX file has no {operator}, as every graph of effnet: export the model again")
    return found


def _values(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The values of a field of bytes, text or messages."""
    return (value for number, value in _fields(message) if number == wanted and not isinstance(value, int))


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    place = 0
    while place < len(message):
        key, place = _number(message, place)
        value: Value
        if key & 7 == 0:
            value, place = _number(message, place)
        else:
            length, place = _number(message, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
            value = message[place : place + length]
            place += length
            if place > len(message):
                raise IndexError("cut short")
        yield key >> 3, value


def _number(message: memoryview, place: int) -> tuple[int, int]:
    """Read a varint; returns the number and the offset after it."""
    number = shift = 0
    while message[place] >= MORE:
        number |= (message[place] - MORE) << shift
        place, shift = place + 1, shift + 7
    return number | message[place] << shift, place + 1


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes; `number` is below 16."""
    length, rest = b"", len(value)
    while rest >= MORE:
        length, rest = length + bytes([rest % MORE + MORE]), rest // MORE
    return bytes([number << 3 | 2]) + length + bytes([rest]) + value


def _text(value: memoryview) -> str:
    return bytes(value).decode()
