"""The step of the forecast's LSTM in ONNX Runtime, one thread: the peer of `warmswap-bench infer`.

The first line on stdin has the sizes and the weights, as JSON; each further line `ROWS STEPS`. The answer to the first is the
version, or why it cannot be; to each further one the ns that each step took, and the outputs of the last, as JSON.
"""
import json
import sys
import time

try:
    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    print(json.dumps({"missing": f"{error}; `pip install onnx onnxruntime` installs it"}), flush=True)
    sys.exit(0)


def answer(value):
    print(json.dumps(value), flush=True)


model = json.loads(sys.stdin.readline())
inputs, hidden, outputs = model["inputs"], model["hidden"], model["outputs"]
weights = model["weights"]
gates = np.array(weights["gates"], np.float32).reshape(inputs + hidden, 4 * hidden)
bias = np.array(weights["gates_bias"], np.float32)
head = np.array(weights["head"], np.float32).reshape(hidden, outputs)
head_bias = np.array(weights["head_bias"], np.float32)


def iofg(matrix):
    """From our order of gates, i f o g, to that of ONNX's LSTM: i o f g."""
    i, f, o, g = np.split(matrix, 4, axis=-1)
    return np.concatenate([i, o, f, g], axis=-1)


def fused(rows):
    """As ONNX Runtime's own LSTM kernel, over a sequence of one step."""
    constants = {
        "W": iofg(gates[:inputs]).T[None].copy(),
        "R": iofg(gates[inputs:]).T[None].copy(),
        "B": np.concatenate([iofg(bias), np.zeros(4 * hidden, np.float32)])[None],
        "V": head,
        "v": head_bias,
        "flat": np.array([rows, hidden], np.int64),
    }
    nodes = [
        helper.make_node("LSTM", ["x", "W", "R", "B", "", "h", "c"], ["", "h2", "c2"], hidden_size=hidden),
        helper.make_node("Reshape", ["h2", "flat"], ["last"]),
        helper.make_node("Gemm", ["last", "V", "v"], ["raw"]),
    ]
    return nodes, constants, [1, rows, inputs], [1, rows, hidden]


def plain(rows):
    """As one matrix product for all gates, which is how our step does it."""
    constants = {"W": gates, "b": bias, "V": head, "v": head_bias}
    nodes = [
        helper.make_node("Concat", ["x", "h"], ["z"], axis=1),
        helper.make_node("Gemm", ["z", "W", "b"], ["all"]),
        helper.make_node("Split", ["all"], ["i", "f", "o", "g"], axis=1, num_outputs=4),
        helper.make_node("Sigmoid", ["i"], ["si"]),
        helper.make_node("Sigmoid", ["f"], ["sf"]),
        helper.make_node("Sigmoid", ["o"], ["so"]),
        helper.make_node("Tanh", ["g"], ["tg"]),
        helper.make_node("Mul", ["sf", "c"], ["kept"]),
        helper.make_node("Mul", ["si", "tg"], ["new"]),
        helper.make_node("Add", ["kept", "new"], ["c2"]),
        helper.make_node("Tanh", ["c2"], ["tc"]),
        helper.make_node("Mul", ["so", "tc"], ["h2"]),
        helper.make_node("Gemm", ["h2", "V", "v"], ["raw"]),
    ]
    return nodes, constants, [rows, inputs], [rows, hidden]


def session(make, rows):
    nodes, constants, x, state = make(rows)
    tensor = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "step",
        [tensor("x", x), tensor("h", state), tensor("c", state)],
        [tensor("raw", [rows, outputs]), tensor("h2", state), tensor("c2", state)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"]), x, state


def nothing(rows):
    """What a call costs that computes nothing."""
    nodes = [
        helper.make_node("Identity", ["h"], ["h2"]),
        helper.make_node("Identity", ["c"], ["c2"]),
        helper.make_node("Identity", ["r"], ["raw"]),
    ]
    return nodes, {"r": np.zeros([rows, outputs], np.float32)}, [rows, inputs], [rows, hidden]


class Step:
    """With inputs and outputs bound, so that nothing of Python's arrays is copied or measured."""

    def __init__(self, make, rows):
        self.session, x, state = session(make, rows)
        self.x = ort.OrtValue.ortvalue_from_numpy(np.full(x, 0.5, np.float32))
        self.shape = state
        self.reset()

    def reset(self):
        zeros = np.zeros(self.shape, np.float32)
        self.states = [[ort.OrtValue.ortvalue_from_numpy(zeros.copy()) for _ in "hc"] for _ in range(2)]
        self.raw = ort.OrtValue.ortvalue_from_numpy(np.zeros([self.shape[-2], outputs], np.float32))
        self.bindings = []
        for now in range(2):
            binding = self.session.io_binding()
            binding.bind_ortvalue_input("x", self.x)
            for name, value in zip(["h", "c"], self.states[now]):
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("raw", self.raw)
            for name, value in zip(["h2", "c2"], self.states[1 - now]):
                binding.bind_ortvalue_output(name, value)
            self.bindings.append(binding)

    def run(self, steps):
        run, bindings, took = self.session.run_with_iobinding, self.bindings, []
        for step in range(steps):
            begun = time.perf_counter_ns()
            run(bindings[step % 2])
            took.append(time.perf_counter_ns() - begun)
        return took


made = {}
answer({"version": ort.__version__})
for line in sys.stdin:
    rows, steps = map(int, line.split())
    if rows not in made:
        makes = {"its LSTM kernel": fused, "one matrix product": plain, "nothing": nothing}
        made[rows] = {name: Step(make, rows) for name, make in makes.items()}
    result = {}
    for name, step in made[rows].items():
        step.reset()
        result[name] = {"ns": step.run(steps), "raw": step.raw.numpy()[0].tolist()}
    answer(result)
