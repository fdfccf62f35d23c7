"""Errors of the operations for input that they cannot take: where, what was expected, what came."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastsae
from fastsae import ops
from fastsae.backends import reference

X, W, BIAS = torch.randn(4, 8), torch.randn(20, 8), torch.randn(20)
IS = r"Make it one: torch\.from_numpy\(x\)"
CODE = reference.topk_encode(X, W, BIAS, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.topk_encode(X[:, :5], W, BIAS, 3), ValueError, r"x must have shape \(\*, 8\).*got \(4, 5\)"),
        (lambda: ops.topk_encode(X[0], W, BIAS, 3), ValueError, r"x must have shape"),
        (lambda: ops.topk_encode(X, W, BIAS[:3], 3), ValueError, r"b_enc must have shape \(20\)"),
        (lambda: ops.topk_encode(X, W, BIAS, 3, scale=BIAS[:3]), ValueError, r"scale must have shape \(20\)"),
        (lambda: ops.topk_encode(X, W, BIAS, 3, scale=BIAS.double()), TypeError, "but scale is torch.float64"),
        (lambda: ops.topk_encode(X, W, BIAS, 21), ValueError, "k must be between 1 and d_sae = 20; got 21"),
        (lambda: ops.topk_encode(X, W, BIAS, 0), ValueError, "got 0"),
        (lambda: ops.topk_encode(X, W, BIAS, 4, features=torch.arange(3)), ValueError, "number of features = 3"),
        (lambda: ops.topk_encode(X.long(), W, BIAS, 3), TypeError, "x must be a float tensor; got torch.int64"),
        (lambda: ops.topk_encode(X.to("meta"), W, BIAS, 3), TypeError, "meta device"),
        (lambda: ops.topk_encode(X.double(), W, BIAS, 3), TypeError, "x is torch.float64 but W_enc is torch.float32"),
        (lambda: ops.topk_encode(X, W, BIAS, 3, backend="gpu"), ValueError, "expected one of auto, reference"),
        (lambda: ops.topk_encode(X, W, BIAS, 3, backend="cuda"), RuntimeError, "'cuda' cannot serve this call"),
        (lambda: ops.topk_encode(X.half(), W.half(), BIAS.half(), 3, backend="cpu"), RuntimeError, "these are float16"),
        (lambda: ops.sparse_decode(CODE[0], CODE[1][:, :2], W), ValueError, r"must both be \(B, k\)"),
        (lambda: ops.sparse_decode(CODE[0], CODE[1].int(), W), TypeError, "indices must be int64"),
        (lambda: ops.joint_decode(*CODE, W, W, None, 4), ValueError, "n must be between 1 and k = 3; got 4"),
        (lambda: ops.joint_decode(*CODE, W, W[:5], None, 2), ValueError, "W_lin must have shape"),
        (lambda: ops.joint_decode(*CODE, W, W, W[:5], 2), ValueError, "V must have shape"),
        (lambda: ops.pairwise_interaction(*CODE, W.double()), TypeError, "but V is torch.float64"),
        (lambda: ops.topk_encode(X, W[0], BIAS, 1), ValueError, r"W_enc must have shape \(\*, \*\), \(d_sae, d_in\)"),
        (
            lambda: ops.topk_encode(X, W, BIAS, 1, features=torch.rand(20) > 0.5),
            TypeError,
            r"int64 indices; got torch.bool",
        ),
        (
            lambda: ops.topk_encode(X, W, BIAS, 1, features=torch.arange(4).int()),
            TypeError,
            r"int64 indices; got torch.int32",
        ),
        (
            lambda: ops.topk_encode(X, W, BIAS, 1, features=torch.arange(4).view(2, 2)),
            ValueError,
            r"features must have shape",
        ),
        (lambda: ops.topk_encode(X, W, BIAS, 1, features=torch.tensor([0, 20])), ValueError, r"repeats, in \[0, 20\)"),
        (lambda: ops.topk_encode(X, W, BIAS, 1, features=torch.tensor([-1, 2])), ValueError, "must be ascending"),
        (lambda: ops.topk_encode(X, W, BIAS, 1, features=torch.tensor([2, 2])), ValueError, "must be ascending"),
        (lambda: ops.sparse_decode(*CODE, W[0]), ValueError, "W_dec must have shape"),
        (lambda: ops.sparse_decode(CODE[0], CODE[1] + 20, W), RuntimeError, r"\[0, 20\)"),
        (lambda: ops.sparse_decode(CODE[0], CODE[1] - 20, W), RuntimeError, r"\[0, 20\)"),
        (lambda: ops.sparse_decode(CODE[0].long(), CODE[1], W), TypeError, "values must be a float tensor"),
        (lambda: ops.sparse_decode(*CODE, W.to("meta")), TypeError, "W_dec is on the meta device"),
        (lambda: ops.pairwise_interaction(*CODE, W[0]), ValueError, "V must have shape"),
        (lambda: ops.joint_decode(*CODE, W[0], None, None, 1), ValueError, "W_dec must have shape"),
        (lambda: ops.joint_decode(*CODE, W, W.double(), None, 1), TypeError, "W_lin is torch.float64"),
        (lambda: ops.joint_decode(*CODE, W, None, None, 0), ValueError, "n must be between 1 and k = 3; got 0"),
        (lambda: fastsae.TopKSAE(8, 20, 3)(X.long()), TypeError, "x must be a float tensor that holds numbers"),
        (lambda: fastsae.TopKSAE(8, 20, 3)(X.to("meta")), TypeError, "got torch.float32 on meta"),
        (
            lambda: fastsae.JointSAE(8, 20, 3)(X.double()),
            TypeError,
            "x is torch.float64 but the weights are torch.float32",
        ),
        *(
            (
                lambda call=call: call(fastsae.TopKSAE(8, 20, 3)),
                TypeError,
                f"{who}: x must be a tensor; got ndarray.*{IS}",
            )
            for who, call in (
                ("TopKSAE", lambda sae: sae(X.numpy())),
                ("TopKSAE", lambda sae: sae.encode(X.numpy())),
                ("TopKSAE", lambda sae: sae.encode_raw(X.numpy())),
                ("TopKSAE", lambda sae: sae.components(X.numpy())),
                ("Normalizer", lambda sae: sae.reconstruct(X.numpy())),
                ("Normalizer", lambda sae: sae.normalizer(X.numpy())),
                ("Normalizer.invert", lambda sae: sae.normalizer.invert(X.numpy())),
                ("Normalizer.measure", lambda sae: sae.normalizer.measure(X.numpy(), "zscore")),
            )
        ),
        (lambda: fastsae.TopKSAE(8, 20, 3).encode_raw(X.tolist()), TypeError, "x must be a tensor; got list$"),
        (lambda: fastsae.TopKSAE(8, 20, 3).decode(X.numpy()), TypeError, "decode: expected a SparseCode.*from_numpy"),
        (lambda: fastsae.TopKSAE(8, 20, 3).decode(X), TypeError, "decode: expected a SparseCode.*; got Tensor"),
        (
            lambda: fastsae.TopKSAE(8, 20, 3).decode(fastsae.SparseCode(CODE[0].numpy(), CODE[1].numpy(), 20)),
            TypeError,
            r"SparseCode: values must be a tensor; got ndarray. Make it one: torch\.from_numpy\(values\)",
        ),
        (
            lambda: fastsae.TopKSAE(8, 20, 3).decode(fastsae.TopKSAE(8, 10, 3).encode(X)),
            ValueError,
            "the code is of 10 features, this SAE has 20",
        ),
        (lambda: fastsae.TopKSAE(8, 20, 3)(X.bfloat16()), TypeError, "x is torch.bfloat16 but the weights"),
    ],
)
def test_bad_input_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_two_devices():
    """A tensor that claims to be on a GPU; nothing is computed with it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(4, 8, device="cuda")
        with pytest.raises(ValueError, match="topk_encode: x is on cuda:0 but W_enc on cpu; move them to one device"):
            ops.topk_encode(there, W, BIAS, 3)
