"""What the benchmarks of the other ops, the module, the service and the training step count and simulate."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benches import (
    catalog_cross_entropy,
    catalog_topk,
    fused_multi_head_attention,
    queueing,
    registry,
    serving,
    softmax_score,
    target_attention_weights,
    training,
)
from benches.case import Refused
from benches.jagged import make_batch

CPU = torch.device("cpu")


def _flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# --- counts, against what torch counts of the same computation ----------------------------------------------


def test_weights():
    batch = make_batch([3, 5], [7, 4], heads=2, dim=8, device=CPU)
    problem = target_attention_weights.WeightsProblem(batch, None)
    assert problem.counts().flops == _flops(target_attention_weights.loop(problem).call)
    pairs = 3 * 7 + 5 * 4
    assert problem.counts().bytes == 4 * ((8 + 11) * 2 * 8 + pairs * 2)
    top = target_attention_weights.WeightsProblem(batch, 2).counts()
    assert top.bytes == 4 * (8 + 11) * 2 * 8 + 8 * 2 * 2 * (4 + 8)
    assert top.exps == pairs * 2


@pytest.mark.parametrize("train", [False, True])
def test_softmax_score(train):
    problem = softmax_score.ScoreProblem([4, 4], 8, "fp32", CPU, train)
    # Of lists of one length padding adds nothing.
    assert problem.counts().flops == _flops(softmax_score.padded(problem).call)
    assert problem.counts().bytes == 4 * ((2 + 8) * 8 + 8) * (3 if train else 1)
    assert problem.counts().exps == 8


def test_catalog_topk():
    problem = catalog_topk.topk_problem(3, 50, 8, 5, "fp32", CPU)
    assert problem.counts().flops == _flops(catalog_topk.matmul(problem).call)
    assert problem.counts().bytes == 4 * 8 * (3 + 50) + 3 * (5 * 4 + 5 * 8 + 4)
    assert problem.counts().exps == 150


def test_catalog_cross_entropy():
    problem = catalog_cross_entropy.LossProblem(6, 50, 8, "fp32", CPU)
    # Torch keeps its logits; whoever does not computes them once more.
    assert problem.counts().flops == _flops(catalog_cross_entropy.matmul(problem).call) * 4 / 3
    assert problem.counts().bytes == 4 * 8 * 3 * (6 + 50)
    assert problem.counts().exps == 2 * 6 * 50


def test_module_where_the_history_is_projected():
    problem, training = (
        fused_multi_head_attention.ModuleProblem(30, [7, 7], 16, 2, "fp32", CPU, train)
        for train in (False, True)
    )
    counted = _flops(fused_multi_head_attention.hand_written(problem).call)
    assert problem.counts().flops == counted
    attention = 4 * 2 * 30 * 7 * 16
    assert training.counts().flops == 3 * (counted - attention) + 7 / 2 * attention


def test_module_where_the_queries_are_projected():
    """One candidate, a long history: written out as plain products, by what torch counts of them."""
    problem = fused_multi_head_attention.ModuleProblem(1, [70], 16, 2, "fp32", CPU, False)
    query, history, weight = problem.query[0], problem.history[0], torch.randn(2, 8, 16)

    def absorbed():
        heads = (query @ torch.randn(16, 16)).view(2, 1, 8) @ weight  # into the history's space, [H, 1, E]
        found = (heads @ history.T).softmax(-1) @ history
        return (found @ weight.transpose(1, 2)).view(1, 16) @ torch.randn(16, 16)

    assert problem.counts().flops == _flops(absorbed)


def test_module_counts_real_events_only():
    padded = fused_multi_head_attention.ModuleProblem(30, [7, 2], 16, 2, "fp32", CPU, False).counts()
    packed = [
        fused_multi_head_attention.ModuleProblem(30, [n], 16, 2, "fp32", CPU, False).counts().flops
        for n in (7, 2)
    ]
    assert padded.flops == sum(packed)


def test_training_step():
    problem = training.StepProblem([4, 4], 50, 16, 2, 1, "fp32", CPU)
    attention = 4 * 2 * (4 * 5 // 2) * 16
    # What remains beside the attention, which torch does not count in its fused form, and the logits again.
    linear = 3 * 2 * 8 * 8 * 16 * 16 + 3 * 2 * 8 * 50 * 16
    assert problem.counts().flops == linear + attention * 7 / 2 + 2 * 8 * 50 * 16


# --- checks that must see what is wrong ---------------------------------------------------------------------


def _disturbed(problem, change):
    contender = problem.ours()
    results = [x.clone() for x in contender.read(contender.call())]
    assert problem.check(results, ours=True).right
    change(results)
    return problem.check(results, ours=True)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_topk_check_sees_a_wrong_item_score_and_lse(place):
    problem = catalog_topk.topk_problem(3, 500, 16, 5, "fp32", CPU)

    def change(results):
        if place == 1:
            results[1][0, 2] = problem.catalog.sum(1).argmin()  # some item that is not among the best
        else:
            results[place][0] += 1.0

    assert not _disturbed(problem, change).right


def test_topk_check_sees_an_item_twice():
    problem = catalog_topk.topk_problem(2, 500, 16, 5, "fp32", CPU)

    def change(results):
        results[1][0, 1] = results[1][0, 0]

    assert _disturbed(problem, change).what == "an item twice"


def test_hard_catalogues_and_options_are_right_and_checked():
    problem = catalog_topk.topk_problem(2, 3000, 16, 5, "fp32", CPU)
    for name, make in catalog_topk.VARIANTS.items():
        of = make(problem)
        results = list(of.ours().call())
        assert of.check(results, ours=True).right, name
        if name != "+equal catalogue":
            worst = results[1].clone()
            worst[0, 0] = (of.catalog @ of.users[0]).argmin()
            assert not of.check([results[0], worst, results[2]], ours=True).right, name


def test_an_excluded_item_is_seen():
    problem = catalog_topk.topk_problem(2, 3000, 16, 5, "fp32", CPU)
    excluding = catalog_topk.VARIANTS["+exclude"](problem)
    assert excluding.check(list(problem.ours().call()), ours=True).what == "an excluded item"


@pytest.mark.parametrize("top", [None, 3])
def test_weights_check_sees_a_wrong_weight(top):
    batch = make_batch([3, 5], [7, 4], heads=2, dim=8, device=CPU)
    problem = target_attention_weights.WeightsProblem(batch, top)

    def change(results):
        results[0].view(-1)[1] += 0.01

    assert not _disturbed(problem, change).right


@pytest.mark.parametrize(
    "case", registry.select(registry.all_cases(), suite="smoke"), ids=lambda case: case.key
)
def test_checks_see_one_wrong_element(case):
    def change(results):
        results[-1].view(-1)[0] += 0.5 if results[-1].is_floating_point() else 1

    assert not _disturbed(case.make(CPU), change).right


# --- peers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["softmax_score", "target_attention_weights", "fused_multi_head_attention"])
def test_peers_are_right_on_cases_of_their_kind(op):
    case = next(c for c in registry.select(registry.all_cases(), ops=[op], suite="smoke"))
    problem = case.make(CPU)
    for name, prepare in case.peers.items():
        contender = prepare(problem)
        verdict = problem.check(contender.read(contender.call()), ours=False)
        assert verdict.right, f"{name}: {verdict}"


def test_gpu_peers_refuse_the_cpu():
    problem = catalog_cross_entropy.LossProblem(6, 50, 8, "fp32", CPU)
    for prepare in (catalog_cross_entropy.liger, catalog_cross_entropy.cut):
        with pytest.raises(Refused, match="cuda only"):
            prepare(problem)


# --- the service --------------------------------------------------------------------------------------------


def test_the_service_is_the_recommenders_model():
    model = serving.ranking_model()
    assert type(model) is serving.Ranking
    fused = [m for m in model.modules() if isinstance(m, serving.FusedMultiHeadAttention)]
    assert len(fused) == 1 + serving.CONFIG.layers
    plain = serving.by_pytorch(model)
    assert not [m for m in plain.modules() if isinstance(m, serving.FusedMultiHeadAttention)]
    assert len([m for m in plain.modules() if isinstance(m, serving.PaddedAttention)]) == len(fused)


def test_service_counts():
    """Of one request nothing is padded, and torch counts what its own attention does not hide."""
    problem = serving.ServingProblem(serving.requests(1), "fp32", CPU)
    (request,) = problem.batch
    candidates, events, dim = len(request.candidates), len(request.history), serving.CONFIG.dim
    hidden = 4 * dim * (candidates * events + serving.CONFIG.layers * events * (events + 1) // 2)
    counted = _flops(serving.plain(problem).call)
    assert problem.counts().flops == counted + hidden


def test_a_queue_by_hand():
    """Three requests, two seconds each, one at a time: the second waits one second, the third two."""
    seconds = iter([0.0, 2.0] * 3)
    stream = serving.requests(3)
    taken = []
    found = queueing.simulate(
        [lambda batch: taken.append(len(batch))], stream, [0.0, 1.0, 2.0], most=1, clock=lambda: next(seconds)
    )
    assert found == [[2.0, 3.0, 4.0]]
    assert taken == [1, 1, 1]


def test_those_who_wait_are_taken_together():
    seconds = iter([0.0, 2.0] * 3)
    taken = []
    found = queueing.simulate(
        [lambda batch: taken.append(len(batch))],
        serving.requests(5),
        [0.0, 0.5, 1.0, 1.5, 10.0],
        most=2,
        clock=lambda: next(seconds) if len(taken) < 3 else 0.0,
    )
    assert taken == [1, 2, 1, 1]
    assert found[0][:3] == [2.0, 3.5, 3.0]


def test_services_answer_alike():
    problem = serving.ServingProblem(serving.requests(3), "fp32", CPU)
    ours, plain = (
        serving.answers(serving.MODELS[name](problem.model), torch.float32, CPU)(problem.batch)
        for name in ("attnrec", "pytorch")
    )
    for mine, other, request in zip(ours, plain, problem.batch, strict=True):
        assert mine.shape == request.candidates.shape
        torch.testing.assert_close(mine, other)


def test_poisson_has_its_rate():
    arrivals = queueing.poisson(20_000, 50.0)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(400.0, rel=0.05)


def test_summary():
    found = queueing.summary([1.0] * 99 + [3.0], [float(i) for i in range(100)])
    assert found["p50"] == 1.0
    assert found["p95"] == 1.0
    assert found["p99"] > 1.0
    assert found["requests_per_second"] == pytest.approx(100 / 102)
