"""The hybrid gradient is the gradient of the objective, shown by enumeration, not by sampling.

A policy over V tokens is a table of logits, one row per prefix. Every response is enumerated, its
gradient is weighted with its probability, and the sum is compared with autograd's gradient of

    J = E [ sum_t c_t - lambda r ],      c_t = log p(y_t) - log q(y_t)

With baselines that need a group, every group of K responses is enumerated.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hybrid_kernels import hybrid_loss, sparse_advantages

VOCABULARY = 3
EOS = 0
REWARD_WEIGHT = 1.5


@dataclass
class World:
    """Every response of one prompt, with a random student, teacher and reward.

    `states` `[B, T]` names the table row of each token's prefix; padding follows an EOS.
    """

    student: Tensor
    teacher: Tensor
    tokens: Tensor
    states: Tensor
    mask: Tensor
    rewards: Tensor

    def objective(self, student: Tensor, reward_weight: float) -> tuple[Tensor, Tensor]:
        """J and the probability of each response, differentiable, in float64."""

        def of_responses(table: Tensor) -> Tensor:
            rows = table.double().log_softmax(-1)[self.states]
            return rows.gather(-1, self.tokens[..., None])[..., 0] * self.mask

        log_p = of_responses(student)
        cost = (log_p - of_responses(self.teacher)).sum(-1)
        probability = log_p.sum(-1).exp()
        return (probability * (cost - reward_weight * self.rewards)).sum(), probability

    def exact_gradient(self, reward_weight: float = REWARD_WEIGHT) -> Tensor:
        student = self.student.double().requires_grad_()
        objective, _ = self.objective(student, reward_weight)
        return torch.autograd.grad(objective, student)[0]


def make_world(length: int, ends: bool) -> World:
    """All responses of at most `length` tokens; with `ends`, one stops after its first EOS."""
    responses = []
    for tokens in itertools.product(range(VOCABULARY), repeat=length):
        end = tokens.index(EOS) + 1 if ends and EOS in tokens else length
        responses.append(tokens[:end])
    responses = sorted(set(responses))
    prefixes: dict[tuple[int, ...], int] = {}
    shape = (len(responses), length)
    tokens, states = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, response in enumerate(responses):
        for t, token in enumerate(response):
            tokens[b, t], mask[b, t] = token, True
            states[b, t] = prefixes.setdefault(response[:t], len(prefixes))
    generator = torch.Generator().manual_seed(length + 10 * ends)
    table = (len(prefixes), VOCABULARY)
    return World(
        student=torch.randn(table, generator=generator),
        teacher=torch.randn(table, generator=generator),
        tokens=tokens,
        states=states,
        mask=mask,
        rewards=torch.randn(len(responses), generator=generator),
    )


def hybrid_gradient(
    world: World,
    *,
    group: int = 1,
    dense_weight: float = 1.0,
    gamma: float = 1.0,
    reward_weight: float = REWARD_WEIGHT,
    baseline: str | Tensor = "none",
    score=lambda rewards: rewards,
    change=lambda advantages, log_ratio, mask: advantages,
    row_weight=lambda mask: torch.ones(mask.shape),
) -> Tensor:
    """E [ gradient of the surrogate ], the mean over a group, through the package.

    A tensor `baseline` has a value for each state. `score` changes the rewards `[groups, group]`.
    `change` and `row_weight` plant mistakes: in the advantages, in the weight of a row.
    """
    count = len(world.tokens)
    groups = torch.tensor(list(itertools.product(range(count), repeat=group)))
    chosen = groups.flatten()
    states, tokens, mask = world.states[chosen], world.tokens[chosen], world.mask[chosen]
    student = world.student.clone().requires_grad_()
    _, probability = world.objective(student.detach(), reward_weight)
    weight = probability[groups].prod(-1).repeat_interleave(group)[:, None].float() / group

    def advantages(terms):
        log_ratio = terms.log_prob - terms.teacher_log_prob
        result = sparse_advantages(
            log_ratio,
            score(world.rewards[groups]).flatten(),
            mask,
            reward_weight=reward_weight,
            gamma=gamma,
            dense_weight=dense_weight,
            group_size=group,
            baseline=baseline[states] if isinstance(baseline, Tensor) else baseline,
        )
        return change(result, log_ratio, mask)

    result = hybrid_loss(
        student[states],
        world.teacher[states],
        tokens,
        advantages,
        mask=mask,
        dense_weight=dense_weight,
        reduction="none",
    )
    (result.loss * weight * row_weight(mask)).sum().backward()
    return student.grad.double()


def bias(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient - exact).norm() / exact.norm())


EXACT = 1e-5  # fp32, summed over up to 50,000 rows
WORLDS = {
    f"T{length}{'-eos' if ends else ''}": make_world(length, ends)
    for length in (3, 4)
    for ends in (False, True)
}
every_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
with_eos = pytest.mark.parametrize(
    "world", [w for name, w in WORLDS.items() if "eos" in name], ids=["T3", "T4"]
)
every_share = pytest.mark.parametrize("dense_weight", [0.0, 0.5, 1.0])


@every_world
def test_the_enumeration_is_complete(world):
    _, probability = world.objective(world.student, REWARD_WEIGHT)
    assert abs(float(probability.sum()) - 1) < 1e-12


@every_share
@every_world
def test_unbiased_without_a_baseline(world, dense_weight):
    gradient = hybrid_gradient(world, dense_weight=dense_weight)
    assert bias(gradient, world.exact_gradient()) < EXACT


@every_share
@every_world
@pytest.mark.parametrize("baseline", ["leave_one_out", "per_token_leave_one_out"])
def test_unbiased_with_a_baseline_of_the_others(baseline, world, dense_weight):
    gradient = hybrid_gradient(world, group=2, dense_weight=dense_weight, baseline=baseline)
    assert bias(gradient, world.exact_gradient()) < EXACT


@pytest.mark.parametrize("baseline", ["leave_one_out", "per_token_leave_one_out"])
def test_unbiased_in_groups_of_three(baseline):
    world = make_world(2, ends=True)
    gradient = hybrid_gradient(world, group=3, baseline=baseline)
    assert bias(gradient, world.exact_gradient()) < EXACT


@every_share
@every_world
def test_unbiased_with_a_baseline_of_the_state(world, dense_weight):
    values = torch.randn(len(world.student), generator=torch.Generator().manual_seed(0))
    gradient = hybrid_gradient(world, dense_weight=dense_weight, baseline=values)
    assert bias(gradient, world.exact_gradient()) < EXACT


@pytest.mark.parametrize("baseline", ["leave_one_out", "per_token_leave_one_out"])
@pytest.mark.parametrize("scored", [(True, False), (True, True, False), (False, False)])
def test_responses_that_are_not_scored_take_no_side(scored, baseline):
    """The reward's gradient is that of the share of responses that are scored."""
    world = make_world(2, ends=True)
    scored = torch.tensor(scored)
    gradient = hybrid_gradient(
        world,
        group=len(scored),
        baseline=baseline,
        score=lambda rewards: torch.where(scored, rewards, torch.nan),
    )
    exact = world.exact_gradient(REWARD_WEIGHT * float(scored.float().mean()))
    assert bias(gradient, exact) < EXACT


def test_scoring_that_depends_on_the_response_is_biased():
    world = make_world(2, ends=True)
    gradient = hybrid_gradient(
        world,
        group=2,
        baseline="leave_one_out",
        score=lambda rewards: torch.where(rewards > 0, rewards, torch.nan),
    )
    cost = world.exact_gradient(0.0)
    reward = world.exact_gradient() - cost
    best = ((gradient - cost) * reward).sum() / reward.square().sum()
    assert bias(gradient, cost + best * reward) > 0.05


@every_share
@every_world
def test_the_group_mean_scales_the_gradient(world, dense_weight):
    """The factor is 1 - 1/K, dense term included: a response is part of its own baseline."""
    gradient = hybrid_gradient(world, group=2, dense_weight=dense_weight, baseline="group_mean")
    assert bias(gradient, 0.5 * world.exact_gradient()) < EXACT


@every_world
def test_a_return_that_starts_at_t_is_caught(world):
    """It counts the token's own cost twice. The direction looks right, which is the danger."""
    exact = world.exact_gradient()
    gradient = hybrid_gradient(world, change=lambda a, log_ratio, mask: a - log_ratio)
    assert bias(gradient, exact) > 0.2
    assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.8


@every_world
@pytest.mark.parametrize("dense_weight", [0.0, 0.5])
def test_leaving_out_the_sampled_share_is_caught(dense_weight, world):
    """The cost that the dense term does not charge has to be in the advantage."""
    gradient = hybrid_gradient(
        world,
        dense_weight=dense_weight,
        change=lambda a, log_ratio, mask: a + (1 - dense_weight) * log_ratio,
    )
    assert bias(gradient, world.exact_gradient()) > 0.1


@every_world
def test_a_flipped_sign_is_caught(world):
    gradient = hybrid_gradient(world, change=lambda a, log_ratio, mask: -a)
    assert bias(gradient, world.exact_gradient()) > 0.5


@with_eos
def test_a_mean_over_each_response_is_biased(world):
    """Dividing by its own length weighs the tokens of short responses more."""
    exact = world.exact_gradient()
    gradient = hybrid_gradient(world, row_weight=lambda mask: 1 / mask.sum(-1, keepdim=True))
    best = (gradient * exact).sum() / gradient.square().sum()
    assert bias(best * gradient, exact) > 0.05


@every_world
def test_a_discount_is_biased_and_more_so_further_from_one(world):
    """The bias is the same for every lambda, because the reward is not discounted."""
    biases = {}
    for reward_weight in (0.0, REWARD_WEIGHT):
        exact = world.exact_gradient(reward_weight)
        biases[reward_weight] = [
            hybrid_gradient(world, gamma=gamma, reward_weight=reward_weight) - exact
            for gamma in (1.0, 0.9, 0.5, 0.0)
        ]
    sizes = [float(b.norm() / exact.norm()) for b in biases[REWARD_WEIGHT]]
    assert sizes[0] < EXACT
    assert sizes[1] > 0.01
    assert sizes == sorted(sizes)
    for plain, rewarded in zip(*biases.values(), strict=True):
        torch.testing.assert_close(plain, rewarded, rtol=1e-4, atol=1e-6)


def test_a_discount_is_harmless_where_later_costs_do_not_depend_on_the_token():
    """With one state per position, the future KL is the same for all earlier tokens."""
    world = make_world(4, ends=False)
    position = torch.arange(4)
    world.states = position.expand_as(world.states)
    world.student, world.teacher = world.student[:4], world.teacher[:4]
    for gamma in (0.0, 0.5):
        gradient = hybrid_gradient(world, gamma=gamma, reward_weight=0.0)
        assert bias(gradient, world.exact_gradient(0.0)) < EXACT


def move_to_optimum(world: World, reward_weight: float) -> float:
    """Sets the student to p ∝ q exp(lambda r) and returns J there, which is -log Z."""
    log_q = world.teacher.double().log_softmax(-1)[world.states]
    log_q = log_q.gather(-1, world.tokens[..., None])[..., 0] * world.mask
    tilted = log_q.sum(-1) + reward_weight * world.rewards.double()
    student = torch.empty_like(world.student)
    for state, token in itertools.product(range(len(student)), range(VOCABULARY)):
        through = ((world.states == state) & (world.tokens == token) & world.mask).any(-1)
        student[state, token] = tilted[through].logsumexp(0)
    world.student = student
    return -float(tilted.logsumexp(0))


@every_share
@pytest.mark.parametrize("ends", [False, True])
def test_no_gradient_at_the_optimum(ends, dense_weight):
    world = make_world(4, ends)
    least = move_to_optimum(world, REWARD_WEIGHT)
    objective, _ = world.objective(world.student, REWARD_WEIGHT)
    assert abs(float(objective) - least) < 1e-5
    assert hybrid_gradient(world, dense_weight=dense_weight).norm() < 1e-5


@pytest.mark.parametrize("ends", [False, True])
def test_a_discount_moves_the_optimum_the_further_the_larger_lambda_is(ends):
    """Without a reward the optimum is the teacher, and stays there."""
    slopes = []
    for reward_weight in (0.0, 0.5, 1.0, 2.0):
        world = make_world(4, ends)
        move_to_optimum(world, reward_weight)
        gradient = hybrid_gradient(world, gamma=0.5, reward_weight=reward_weight)
        slopes.append(float(gradient.norm()))
    assert slopes[0] < 1e-5
    assert slopes[1] > 1e-2
    assert slopes == sorted(slopes)
