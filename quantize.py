"""Smaller copies of an ONNX file of export.py: in float16, or in int8, calibrated on images.

The layers within the network are made smaller; those that give classes and boxes keep float32, as do the positions at
which attention samples.
"""

import ast
import logging
import re
import warnings

from errors import UserError

INNER_LAYERS = "MatMul", "Gemm", "Conv"
OUTPUTS = r"class|score|box|regression|lqe|sampling_offsets"  # in the names of the modules that give them


def to_int8(source, target, images):
    """Static quantisation of `source` to `target`; images: arrays (1, 3, H, W) that show how large activations get."""
    onnx, onnxruntime = import_onnx()
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self):
            self.left = iter(images)

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {"images": image}

    inner = inner_layers(onnx.load(str(source)).graph)
    with silenced(onnxruntime):
        quantize_static(
            str(source),
            str(target),
            Images(),
            per_channel=True,
            op_types_to_quantize=list(INNER_LAYERS),
            nodes_to_quantize=inner,
        )


def to_half(source, target, images=None):
    """float16 for the layers within the network, which GPUs are fast in; inputs and outputs stay float32."""
    onnx, onnxruntime = import_onnx()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto = onnx.load(str(source))
    inner = set(inner_layers(proto.graph))
    others = [node.name for node in proto.graph.node if node.name not in inner]
    with silenced(onnxruntime):
        proto = convert_float_to_float16(proto, keep_io_types=True, node_block_list=others, op_block_list=[])
    onnx.save(proto, str(target))


def inner_layers(graph):
    """The names of the nodes that multiply by weights, but for those of OUTPUTS."""
    weights = {initializer.name for initializer in graph.initializer}
    names = []
    for node in graph.node:
        if node.op_type in INNER_LAYERS and node.input[1] in weights:
            about = {entry.key: entry.value for entry in node.metadata_props}
            modules = ast.literal_eval(about.get("pkg.torch.onnx.name_scopes", "[]"))
            if modules and not re.search(OUTPUTS, ".".join(modules)):
                names.append(node.name)
    if not names:
        raise UserError("--int8, --half: this version of torch.onnx does not say which layers its nodes are from")
    return names


def import_onnx():
    """-> the modules onnx, onnxruntime. Raises UserError."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install onnx onnxscript onnxruntime") from None
    return onnx, onnxruntime


class silenced:
    """onnxruntime advises to shape inference, which the graphs have had, and counts its tensors."""

    def __init__(self, onnxruntime):
        self.onnxruntime = onnxruntime

    def __enter__(self):
        self.level = logging.root.level
        logging.root.setLevel(logging.ERROR)
        self.onnxruntime.set_default_logger_severity(3)
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        self.caught.__exit__(*error)
        self.onnxruntime.set_default_logger_severity(2)
        logging.root.setLevel(self.level)
