"""LearnedOptimizer saved, loaded and copied."""

import copy
import io
import pickle

import pytest
import torch
from optimizer_cases import RULES, make, run, same, values

import lightning_metaopt as lmo


@pytest.mark.parametrize("name", RULES)
def test_resume_is_exact(name: str) -> None:
    straight, broken = make(), make()
    run(lmo.LearnedOptimizer(straight, RULES[name][0]()), straight, 10)
    first = lmo.LearnedOptimizer(broken, RULES[name][0]())
    run(first, broken, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other = RULES[name][0]()
    with torch.no_grad():
        for phi in other.parameters():
            phi.add_(0.3)  # what counts is the saved phi
    second = lmo.LearnedOptimizer(broken, other)
    groups = second.param_groups
    inner = list(groups)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.param_groups is groups
    assert all(a is b for a, b in zip(second.param_groups, inner, strict=True))
    run(second, broken, 6, first=4)
    assert same(values(straight), values(broken))


def test_state_dict_looks_like_that_of_torch() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, lmo.rules.HeavyBall(0.1))
    run(optimizer, params, 1)
    saved = optimizer.state_dict()
    assert [saved["state"][i]["momentum"].shape for i in range(3)] == [p.shape for p in params]
    assert saved["param_groups"][0]["params"] == [0, 1, 2]
    stateless = lmo.LearnedOptimizer(params, lmo.rules.GradientDescent())
    run(stateless, params, 1)
    assert stateless.state_dict()["state"] == {}


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer(params, lmo.rules.HeavyBall(0.1))
    run(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    strangers = {
        "no entry 'rule'": torch.optim.SGD(params).state_dict(),
        "class": lmo.LearnedOptimizer(params, lmo.rules.Adam()).state_dict(),
        "config": lmo.LearnedOptimizer(params, lmo.rules.HeavyBall(nesterov=True)).state_dict(),
        "parameter group": lmo.LearnedOptimizer(params[:2], lmo.rules.HeavyBall(0.3)).state_dict(),
    }
    for match, stranger in strangers.items():
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(stranger)
    odd = copy.deepcopy(state)
    odd["rule"]["phi"]["log_lr"] = torch.zeros(2)
    with pytest.raises(ValueError, match="'log_lr' has shape"):
        optimizer.load_state_dict(odd)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][i]["momentum"], state["state"][i]["momentum"]) for i in range(3))
    assert torch.equal(after["rule"]["phi"]["log_lr"], state["rule"]["phi"]["log_lr"])


def test_deepcopy_and_pickle_keep_the_rule() -> None:
    params = make()
    optimizer = lmo.LearnedOptimizer([(f"p{i}", p) for i, p in enumerate(params)], lmo.rules.HeavyBall(0.1), max_update_norm=0.5)
    run(optimizer, params, 2)
    twins = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(optimizer, params, 2, first=2)
    for twin in twins:
        own = [p for group in twin.param_groups for p in group["params"]]
        assert not any(a is b for a, b in zip(own, params, strict=True))
        assert twin.max_update_norm == 0.5
        run(twin, own, 2, first=2)
        assert same(values(own), values(params))
