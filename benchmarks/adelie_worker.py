"""Run adelie on stored features, for benchmarks/group_lasso.py; needs an environment with adelie (numpy < 2)."""

import json
import sys
import time

import adelie as ad
import numpy as np

spec = json.loads(sys.argv[2])
loaded = np.load(spec["data"])
X, y = loaded["X"], loaded["y"].astype(int)
n_classes = int(y.max()) + 1

start = time.perf_counter()
X = np.asfortranarray(X, dtype=np.float64)
X -= X.mean(0)
X /= np.where(X.std(0) > 0, X.std(0), 1)
unit = np.sqrt(n_classes) * n_classes  # adelie: loss / K, penalty sqrt(K) per group
state = ad.grpnet(
    X,
    ad.glm.multinomial(np.asfortranarray(np.eye(n_classes)[y])),
    lmda_path=np.asarray(spec["alphas"]) / unit,
    early_exit=False,
    n_threads=spec["threads"],
    progress_bar=False,
    tol=spec["tol"],
    adev_tol=1.0,
)
seconds = time.perf_counter() - start

points = []
for beta in state.betas:
    W = beta.toarray().reshape(-1, n_classes)
    rows = np.flatnonzero(np.linalg.norm(W, axis=1))
    points.append((rows, W[rows]))
np.savez(
    spec["out"],
    alphas=np.asarray(state.lmdas) * unit,
    point=np.concatenate([np.full(len(rows), i) for i, (rows, _) in enumerate(points)]),
    row=np.concatenate([rows for rows, _ in points]),
    coef=np.concatenate([values for _, values in points]),
    intercept=np.asarray(state.intercepts),
)
with open("/proc/self/status") as status:
    peak = int(status.read().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
print(json.dumps({"seconds": seconds, "peak_mb": peak}))
