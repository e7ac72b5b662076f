"""Libraries of vector search, in their exact modes: ScaNN's brute force, faiss' flat index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benches.case import Contender, Refused
from benches.peers import need, need_device


def scann(problem: Any) -> Contender:
    users, catalog = _float32(problem)
    builder = need("scann").scann_ops_pybind.builder(catalog, problem.k, "dot_product")
    searcher = builder.set_n_training_threads(torch.get_num_threads()).score_brute_force().build()
    if len(users) == 1:
        search = lambda: searcher.search(users[0])  # noqa: E731
    else:
        searcher.set_num_threads(torch.get_num_threads())
        search = lambda: searcher.search_batched_parallel(users)  # noqa: E731

    def read(raw: tuple[Any, Any]) -> list[Tensor]:
        ids, scores = (torch.from_numpy(x).view(len(users), -1) for x in raw)
        return [scores, ids.long()]

    return Contender(search, read, own_threads=True)


def faiss_flat(problem: Any) -> Contender:
    """As it comes: BLAS from 20 users on, a loop of its own below."""
    return _faiss(problem, None)


def faiss_flat_blas(problem: Any) -> Contender:
    """With `distance_compute_blas_threshold = 1`: always BLAS."""
    return _faiss(problem, 1)


def _faiss(problem: Any, threshold: int | None) -> Contender:
    users, catalog = _float32(problem)
    faiss = need("faiss")
    index = faiss.IndexFlatIP(catalog.shape[1])
    index.add(catalog)

    @contextmanager
    def settings() -> Iterator[None]:
        """Global ones, so they hold for the call only."""
        before = faiss.cvar.distance_compute_blas_threshold
        if threshold is not None:
            faiss.cvar.distance_compute_blas_threshold = threshold
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            yield
        finally:
            faiss.cvar.distance_compute_blas_threshold = before

    def call() -> tuple[Any, Any]:
        with settings():
            return index.search(users, problem.k)

    return Contender(call, lambda raw: [torch.from_numpy(x) for x in raw], own_threads=True)


def _float32(problem: Any) -> tuple[Any, Any]:
    need_device(problem.device, "cpu")
    if problem.users.dtype != torch.float32:
        raise Refused("takes float32 only")
    return problem.users.numpy(), problem.catalog.numpy()
