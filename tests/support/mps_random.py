"""Random cases for the MPS classes, in the schema of golden.json, each from a seed of its own.

Sizes are small and every parameter is drawn, ordinary values more often than odd ones: windows larger than
the image, windows that miss it, far and negative offsets, empty axes, clip rectangles that hang over,
channel ranges, ties, NaN and infinities.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

Case = dict[str, Any]
Struct = dict[str, Any]
Operation = tuple[Struct, dict[str, np.ndarray | None]]  # parameters and inputs

POOLINGS = ("max", "average", "l2norm", "dilated_max")
CLASSES: dict[str, tuple[str, str | None]] = {
    **{f"{kind}": ("pool_forward", kind) for kind in POOLINGS},
    **{f"{kind}_gradient": ("pool_gradient", kind) for kind in POOLINGS},
    "conv_transpose": ("conv_transpose_forward", None),
    "conv_transpose_gradient": ("conv_transpose_gradient", None),
}
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NEURONS: dict[
    str, dict[str, float]
] = {  # parameters under which the values here stay far from poles and overflow
    "none": {},
    "relu": {"a": 0.25},
    "linear": {"a": 0.5, "b": -1.0},
    "sigmoid": {},
    "hard_sigmoid": {"a": 0.125, "b": 0.5},
    "tanh": {"a": 1.5, "b": 0.25},
    "absolute": {},
    "soft_plus": {"a": 0.5, "b": 0.25},
    "soft_sign": {},
    "elu": {"a": 0.5},
    "prelu": {},
    "relun": {"a": 0.125, "b": 6.0},
    "power": {"a": 0.125, "b": 1.0, "c": 2.0},
    "exponential": {"a": 0.0625, "b": 0.5, "c": 2.0},
    "logarithm": {"a": 0.0078125, "b": 4.0, "c": 10.0},
    "gelu": {},
}


@dataclasses.dataclass(frozen=True)
class Random:
    """One random case: in golden.json's schema, and the type in which the classes are to see it."""

    case: Case
    dtype: str


def draw(name: str, index: int) -> Random:
    """Case number `index` of a class in `CLASSES`; the same on every machine."""
    rng = np.random.default_rng([list(CLASSES).index(name), index])
    dtype = str(rng.choice(list(DTYPES), p=[0.6, 0.2, 0.1, 0.1]))
    op, kind = CLASSES[name]
    params, inputs = getattr(_Draw(rng, dtype), op)(kind)
    case = {"id": f"{name}-{index}", "op": op, "params": params, "inputs": inputs}
    return Random(case, dtype)


class _Draw:
    def __init__(self, rng: np.random.Generator, dtype: str) -> None:
        self.rng, self.dtype = rng, dtype

    # Scalars

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def size(self, high: int = 6) -> int:
        return 0 if self.chance(0.01) else self.integer(1, high)

    def side(self, high: int) -> int:
        """The larger of two sizes: most images are no line."""
        return max(self.size(high), self.size(high)) if self.chance(0.9) else self.size(high)

    def start(self, length: int) -> int:
        """The first of `length` things; now and then there is none."""
        return length if self.chance(0.03) else self.integer(0, max(0, length - 1) // 2)

    def offset(self, centre: int) -> int:
        """Near `centre`, sometimes far away."""
        if self.chance(0.05):
            return centre + self.integer(-15, 15)
        return centre + int(self.rng.choice([-3, -2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2, 3]))

    # Arrays

    def array(self, shape: int | Sequence[int], special: bool = True) -> np.ndarray:
        """Values that the type can hold; few distinct ones for ties, or many."""
        if self.chance(0.5):
            x = self.rng.integers(-2, 2, shape, endpoint=True).astype(np.float64)
        else:
            x = self.rng.normal(scale=3, size=shape)
        if special and self.chance(0.12):
            odd = self.rng.choice([np.nan, np.inf, -np.inf], size=shape, p=[0.5, 0.25, 0.25])
            x = np.where(self.rng.random(shape) < self.rng.choice([0.1, 0.9], p=[0.9, 0.1]), odd, x)
        return x.astype(DTYPES[self.dtype]).astype(np.float64)

    # Structs

    def geometry(self, kind: str) -> Struct:
        """Kernel, stride and dilation of both axes, and where to look for interesting offsets."""
        kernel = [self.integer(1, 9) if self.chance(0.1) else self.integer(1, 4) for _ in range(2)]
        stride = [self.integer(1, 4) for _ in range(2)]
        dilation = [self.integer(1, 3) if kind in ("dilated_max", "any") else 1 for _ in range(2)]
        return {"kernel": kernel, "stride": stride, "dilation": dilation}

    def edges(self, kind: str) -> Struct:
        """Edge mode, and a band of zeros that averages may count."""
        band = {"x": 0, "y": 0}
        if kind == "average":
            band = {"x": self.integer(0, 3), "y": self.integer(0, 3)}
        return {"edge_mode": str(self.rng.choice(["zero", "clamp"])), "zero_pad": band}

    def clip_rect(self, shape: Sequence[int], depth: int) -> Struct | None:
        """None, or a rectangle that may hang over, of `depth` images where that is a number."""
        if self.chance(0.5):
            return None
        n, height, width, _ = shape
        origin = {"x": self.start(width), "y": self.start(height), "z": self.start(n)}
        size = {
            "width": None if self.chance(0.2) else self.size(width + 2),
            "height": None if self.chance(0.2) else self.size(height + 2),
            "depth": None if self.chance(0.5) else depth,
        }
        return {"origin": origin, "size": size}

    @staticmethod
    def images(clip_rect: Struct | None, n: int) -> int:
        """How many of `n` destination images a clip rectangle holds."""
        if clip_rect is None:
            return n
        left, depth = n - clip_rect["origin"]["z"], clip_rect["size"]["depth"]
        return left if depth is None else min(left, depth)

    # The operations

    def pool_forward(self, kind: str) -> Operation:
        params = {"kind": kind, **self.geometry(kind), **self.edges(kind)}
        height, width, channels = self.side(7), self.side(7), self.size(3)
        n = self.size(2)
        first = 0 if self.chance(0.5) else self.start(channels)
        most = None if self.chance(0.5) else self.size(3)
        count = min(channels - first, channels if most is None else most)
        into = self.integer(0, 2) if self.chance(0.3) else 0
        room = into + count + (self.integer(0, 2) if self.chance(0.3) else 0)
        shape = [n, self.size(), self.size(), room]
        clip_rect = self.clip_rect(shape, self.size(2))
        z = self.integer(0, 2) if self.chance(0.3) else 0
        images = z + self.images(clip_rect, n) + (self.integer(0, 1) if self.chance(0.3) else 0)
        if 0 in (height, width) and kind != "average":
            params["edge_mode"] = "zero"  # there is no edge pixel to read
        params |= {
            "offset": self.centre(params, z),
            "clip_rect": clip_rect,
            "destination_shape": shape,
            "destination_fill": float(self.rng.choice([0.0, -77.0])),
            "source_feature_channel_offset": first,
            "source_feature_channel_max_count": most,
            "destination_feature_channel_offset": into,
        }
        return params, {"source": self.array((images, height, width, channels))}

    def centre(self, params: Struct, z: int) -> Struct:
        y, x = ((k - 1) * d // 2 for k, d in zip(params["kernel"], params["dilation"], strict=True))
        return {"x": self.offset(x), "y": self.offset(y), "z": z}

    def pool_gradient(self, kind: str) -> Operation:
        params = {"kind": kind, **self.geometry(kind), **self.edges(kind)}
        source = [self.size(2), self.side(7), self.side(7), self.size(3)]
        gradient = [self.size(2), self.side(7), self.side(7), source[3]]
        primary = {name: self.integer(-2, 2) if self.chance(0.3) else 0 for name in "xy"}
        primary["z"] = self.integer(-1, 1) if self.chance(0.2) else 0
        size = None
        if self.chance(0.5):
            names = {"width": 7, "height": 7, "depth": 2}
            size = {n: None if self.chance(0.3) else self.size(most) for n, most in names.items()}
        z = self.integer(0, 1) if self.chance(0.3) else 0
        # Every image that counts has its source image.
        last = gradient[0] if size is None or size["depth"] is None else primary["z"] + size["depth"]
        source[0] = max(source[0], z + min(gradient[0], last) - primary["z"])
        if 0 in source[1:3] and kind != "average":
            params["edge_mode"] = "zero"
        shape = list(source)
        if self.chance(0.3):
            shape[:3] = self.size(3), self.size(9), self.size(9)
        offset = self.centre(params, z)
        clip_rect = self.clip_rect(shape, self.size(2))
        params |= {
            "primary_offset": primary,
            "secondary_offset": offset,
            "source_size": size,
            "clip_rect": clip_rect,
            "destination_shape": shape,
            "destination_fill": float(self.rng.choice([0.0, -77.0])),
        }
        # NaN of a gradient stays where it belongs.
        return params, {"source_gradient": self.array(gradient), "source": self.array(source)}

    def transposed(self) -> tuple[Struct, tuple[int, ...]]:
        """Parameters of both transposed convolutions, the shape of the weights, and a total offset."""
        window = self.geometry("any")
        if self.chance(0.3):
            window["dilation"] = [1, 1]
        kernel = window.pop("kernel")
        groups = int(self.rng.choice([1, 1, 2, 3]))
        weights = (groups * self.integer(1, 2), *kernel, self.integer(1, 2))
        offset, within = {"z": 0}, {}
        for axis, name in enumerate("yx"):
            offset[name] = 0 if self.chance(0.5) else self.offset(0)
            within[name] = 0 if self.chance(0.3) else self.offset((kernel[axis] - 1) // 2)
        return {**window, "offset": offset, "kernel_offset": within, "groups": groups}, weights

    def conv_transpose_forward(self, _: None) -> Operation:
        params, weights = self.transposed()
        n = self.size(2)
        shape = [n, self.size(8), self.size(8), weights[0]]
        clip_rect = self.clip_rect(shape, self.size(2))
        z = self.integer(0, 2) if self.chance(0.3) else 0
        params["offset"]["z"] = z
        images = z + self.images(clip_rect, n) + (self.integer(0, 1) if self.chance(0.3) else 0)
        source = (images, self.size(5), self.size(5), weights[3] * params["groups"])
        kind = "none" if self.chance(0.4) else str(self.rng.choice(list(NEURONS)))
        neuron = {"type": kind, "a": 0.0, "b": 0.0, "c": 0.0} | NEURONS[kind]
        if kind == "prelu":
            neuron["a"] = [0.25 * (o + 1) for o in range(weights[0])]
        params |= {
            "edge_mode": "zero",
            "neuron": neuron,
            "clip_rect": clip_rect,
            "destination_shape": shape,
            "destination_fill": float(self.rng.choice([0.0, -77.0])),
        }
        bias = None if self.chance(0.3) else self.array(weights[0], special=False)
        # Weights stay finite: whether an inserted zero times infinity counts is nobody's business.
        return params, {
            "source": self.array(source, special=kind == "none"),
            "weights": self.array(weights, special=False),
            "bias": bias,
        }

    def conv_transpose_gradient(self, _: None) -> Operation:
        params, weights = self.transposed()
        params["gradient_option"] = int(self.rng.choice([1, 2, 3, 3, 3]))
        n = self.size(2)
        z = self.integer(0, 1) if self.chance(0.2) else 0
        params["offset"]["z"] = z
        source = (z + n, self.size(5), self.size(5), weights[3] * params["groups"])
        return params, {
            "source_gradient": self.array((n, self.size(8), self.size(8), weights[0])),
            "source": self.array(source),
            "weights": self.array(weights, special=False),
        }
