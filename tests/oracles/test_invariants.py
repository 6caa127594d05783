"""Invariants that no other file of this folder tests; all of them, and where each has its test.

`STATED` lists every invariant of projected and of compressed methods; a test sees that each of the tests
exists. Two cannot hold by design:

* CAME whose confidence is constant is Adafactor with a momentum: beta3 lies below 1, and the confidence is
  an average from zero, so it is never constant.
* A Trion of full rank is Muon: there is no Trion; what makes it so, Newton and Schulz in any basis, is below.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.optim.rules.compact.smmf import outer, square
from lowmem.optim.terms.state import scoped
from tests.oracles.drive import follow, gradients, name_without_offset, on_weights, start_of, step

TESTS = Path(__file__).parents[1]
STATED: dict[str, str] = {
    # projected methods
    "bases are orthonormal after a refresh": "test_the_basis_is_orthonormal_and_no_wider_than_the_matrix",
    "down(up(R)) = R":
        "test_what_is_lifted_is_seen_again_and_nothing_is_counted_twice",
    "power iteration sees what an SVD sees": "test_power_iteration_sees_what_an_svd_sees",
    "no sign of rounding noise at full rank": "test_svd_at_full_density_skips_the_sign_of_rounding_noise",
    "the transposed problem": "test_the_transposed_problem_has_the_transposed_solution",
    "signs and order of a basis": "test_order_and_signs_of_a_basis_do_not_matter_to_moments_that_rotate",
    "cosines": "test_the_cosines_are_orthonormal_and_find_their_own",
    "Grassmann: a tangent, and eta of 0": "test_a_tangent_lies_beside_the_basis_and_a_small_turn_is_none",
    "Grassmann: a gradient inside the basis": "test_a_gradient_that_a_basis_sees_whole_does_not_turn_it",
    "Grassmann: as far on either side": "test_a_tracked_basis_moves_as_far_on_either_side",
    "an online basis at rest":
        "test_an_online_basis_rests_at_the_leading_subspace_and_the_penalty_holds_its_length",
    "seeds name bases": "test_a_name_is_a_basis",
    "a sketch keeps norms on average": "test_a_sketch_keeps_norms_on_average",
    "full rank is Adam in a rotated basis": "test_full_rank_without_refresh_is_adam_in_the_rotated_basis",
    "with the identity it is AdamW": "test_with_the_identity_for_a_basis_it_is_adamw",
    "FRUGAL without a rest is GaLore": "test_frugal_without_a_rest_is_galore",
    "the size of gradients": "test_the_size_of_gradients_matters_only_where_a_step_is_one",
    "the rank of what was moved": "test_the_rank_of_what_was_moved",
    "SGD with an SGD rest is SGD": "test_descent_in_the_subspace_and_descent_of_the_rest_are_descent",
    "SGD of random refreshes too": "test_a_random_refresh_of_descent_with_its_rest_is_descent",
    "momentum beside descent": "test_momentum_in_a_fixed_basis_and_descent_beside_it",
    "a zero gradient": "test_a_zero_gradient_moves_no_basis",
    "rho of 1": "test_density_one_is_adamw_within_a_window_and_restarts_after_it",
    "rho of 0": "test_where_nothing_is_seen_it_is_sign_descent_and_holds_nothing",
    "inactive entries move by lr times scale": "test_an_inactive_entry_moves_by_lr_times_scale_exactly",
    "blocks have their turn": "test_blocks_has_its_share_of_tensors_active_and_each_once_a_sweep",
    "moments turn with their basis": "test_moments_turn_with_their_basis",
    "LDAdam of full rank owes nothing": "test_full_rank_owes_nothing_and_is_adam_in_the_basis",
    "error feedback telescopes": "test_what_was_stepped_and_what_is_owed_are_all_gradients",
    "error feedback in few bits": "test_an_error_in_fewer_bits_stays_near_it",
    "a new direction is no spike": "test_the_first_step_of_a_new_direction_is_no_longer_than_lr",
    "subsets of one element are Adam": "test_subsets_of_one_element_are_adam",
    "subset norms are sums": "test_norms_are_sums",
    "one subset is the normalised gradient": "test_one_subset_is_the_normalised_gradient",
    "subspace momentum of full rank": "test_full_rank_without_refresh_is_momentum",
    "after a reset the average is of the new gradient alone": "test_a_reset_leaves_nothing_stale_behind",
    "APOLLO steps along channels": "test_apollo_steps_along_the_channels_of_its_gradient",
    "a first step has the length of signs": "test_a_first_step_has_the_length_of_adams_signs",
    "the limiter": "test_growth_is_limited_from_the_second_step_on",
    "Fira of full rank is GaLore": "test_fira_of_full_rank_is_galore",
    "Dion of full rank sees all of its momentum": "test_dion_of_full_rank_leaves_its_share_of_the_momentum",
    "Dion converges to the polar factor": "test_dion_of_full_rank_becomes_the_polar_factor",
    "Newton and Schulz of an orthogonal matrix": "test_an_orthogonal_gradient_is_its_own_factor",
    "Newton and Schulz in any basis": "test_newton_and_schulz_do_not_know_the_basis",
    "planned bytes, resume, accumulation, release": "test_planned_bytes_are_held_bytes",
    "resume on and beside a refresh": "test_resume_through_a_file_is_exact",
    "micro-batches are one batch": "test_accumulating_micro_batches_is_one_large_batch",
    "release is the ordinary step": "test_stepping_during_backward_is_the_ordinary_step",
    "small updates of bf16 weights": "test_small_decay_reaches_bf16_weights",
    "bases of bf16 weights are fp32": "test_a_basis_of_bf16_weights_is_fp32",
    # compressed states
    "dynamic maps": "test_dynamic_maps_are_torchaos_and_the_papers",
    "encoding again": "test_encoding_again_what_was_decoded_keeps_positive_blocks",
    "zero blocks": "test_zero_blocks_stay_zero_and_finite",
    "codes of 2^k x": "test_codes_do_not_change_with_a_power_of_two",
    "8-bit AdamW is torchao's": "test_codes_scales_and_weights_are_torchaos",
    "4-bit AdamW is torchao's": "test_4bit_codes_scales_and_weights_are_torchaos",
    "8-bit AdamW is near bitsandbytes'": "test_8_bit_steps_are_near_those_of_bitsandbytes",
    "8 and 4 bits stay near fp32": "test_trajectory_stays_near_fp32",
    "packing of codes": "test_int4_keeps_its_error_bound_and_packs_two_codes_a_byte",
    "packing of signs": "test_signs_survive_packing",
    "companded codes are monotone": "test_companded_codes_are_monotone_in_the_value",
    "Adafactor of rank one": "test_a_rank_one_gradient_gives_its_sign",
    "Adafactor: first vectors, sizes, permutations": "test_rows_and_columns_may_be_exchanged",
    "Adafactor: clipped": "test_the_step_is_clipped",
    "Adafactor: in units of the weight": "test_the_step_scales_with_the_weight",
    "factors keep the sums of rows and columns": "test_factors_keep_the_sums_of_rows_and_columns",
    "SMMF of a prime": "test_a_prime_number_of_elements_loses_nothing",
    "SMMF of rank one": "test_moments_of_rank_one_lose_nothing",
    "SMMF's sums are Adafactor's": "test_the_sums_of_smmf_are_those_of_adafactor",
    "SMMF's first step": "test_the_first_step_is_a_tenth_of_the_sign",
    "SM3 bounds sums of squares": "test_sm3_bounds_the_sums_of_squares_and_never_shrinks",
    "SM3 of a vector": "test_sm3_of_a_vector_is_adagrad",
    "Adam-mini of small blocks": "test_adam_mini_is_adamw_where_blocks_have_one_size",
    "CAME's first step": "test_the_first_step_of_came_is_as_long_as_it_says",
    "AdaLomo in units of the weight": "test_a_step_of_ada_lomo_scales_with_its_weight",
    "MicroAdam of all is Adam": "test_microadam_that_keeps_everything_is_adam",
    "MicroAdam loses nothing": "test_what_is_not_taken_comes_later",
    "MicroAdam moves its window": "test_only_the_window_moves",
    "MicroAdam: others only decay": "test_untouched_weights_change_by_decay_alone",
    "MicroAdam grows as published": "test_the_step_of_a_constant_coordinate_grows_as_published",
    "dtypes survive a checkpoint": "test_loading_keeps_the_dtype_of_every_tensor",
    "FISH: others keep their bits": "test_others_keep_their_bits_where_weights_are_rounded_at_random",
    "cautious": "test_a_cautious_step_never_goes_against_the_gradient",
    "Grams": "test_grams_has_the_sign_of_the_gradient_and_the_size_of_adam",
    "SPAM that does nothing": "test_spam_that_neither_clips_nor_forgets_is_adamw",
    "SPAM after a reset": "test_steps_grow_back_after_a_reset",
    "Stable-SPAM and scale": "test_stable_spam_does_not_know_the_scale_of_gradients",
    "signs": "test_steps_of_signs_are_of_three_kinds_and_know_no_scale",
    "SGD-SaI and scale": "test_the_scale_does_not_know_the_size_of_the_gradient",
    "SGD-SaI without mean": "test_the_scale_of_a_gradient_without_mean_is_the_root_of_its_size",
    "stochastic rounding": "test_stochastic_rounding_is_unbiased_and_stays_next_to_the_value",
    "what fits is not rounded": "test_stochastic_rounding_leaves_what_fits_alone",
    "Kahan": "test_kahan_adds_up_what_nearest_loses",
    "closed forms of bytes": "test_a_page_states_the_bytes_that_are_held",
    "the cutting does not count": "test_the_cutting_does_not_count",
    "bad elements": "test_bad_elements_keep_their_weight_and_are_counted",
}  # fmt: skip


def test_each_has_its_test() -> None:
    text = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    missing = {name for name in STATED.values() if not re.search(rf"^def {name}\(", text, re.MULTILINE)}
    assert not missing


def test_a_reset_leaves_nothing_stale_behind() -> None:
    gap, shape = 3, (6, 10)
    options: dict[str, Any] = {"rank": 2, "update_proj_gap": gap, "on_refresh": "reset", "projector": "svd"}
    key = name_without_offset(gap)
    one, params = on_weights("galore", {key: start_of(shape)}, hyper={"lr": 0.0}, **options)
    for g in gradients(shape, gap + 1):
        step(one, params, {key: g})
    state = one.state[params[key]]
    seen = state["projector.basis"].t() @ g
    torch.testing.assert_close(state["inner.exp_avg"], 0.1 * seen, rtol=0, atol=1e-6)
    assert int(state["inner.age"]) == 1


def test_dion_of_full_rank_leaves_its_share_of_the_momentum() -> None:
    """B = P R', so that what stays of it is momentum B."""
    shape, held = (5, 8), torch.zeros(5, 8)
    one, params = on_weights("dion", {"w": start_of(shape)}, hyper={"lr": 0.01}, rank=5, momentum=0.9)
    for g in gradients(shape, 4):
        step(one, params, {"w": g})
        held = 0.9 * (held + g)
        torch.testing.assert_close(one.state[params["w"]]["momentum"], held, rtol=0, atol=1e-5)


def orthogonal(m: int, seed: int) -> Tensor:
    return torch.linalg.qr(gradients((m, m), 1, seed)[0])[0]


def stepped_by(g: Tensor) -> Tensor:
    """Muon's first step, in units of lr."""
    return -follow("muon", torch.zeros_like(g), [g], hyper={"lr": 1.0})[0]


def test_an_orthogonal_gradient_is_its_own_factor() -> None:
    g = orthogonal(12, 3)
    factor = (g.t() @ stepped_by(g)).diagonal() / (0.2 * 12**0.5)
    assert float(factor.std()) < 1e-4
    assert 0.68 <= float(factor.mean()) <= 1.15


def test_newton_and_schulz_do_not_know_the_basis() -> None:
    (g,), q = gradients((7, 12), 1), orthogonal(12, 4)
    torch.testing.assert_close(stepped_by(g @ q) @ q.t(), stepped_by(g), rtol=0, atol=1e-4)


def test_factors_keep_the_sums_of_rows_and_columns() -> None:
    """Of |m| and v, whose factors are held."""
    one, params = on_weights("smmf", {"w": start_of((6, 8))}, hyper={"lr": 0.01})
    (g,) = gradients((6, 8), 1)
    step(one, params, {"w": g})
    held, (a, b) = one.state[params["w"]], square(48)
    for name, exact in (("exp_avg", 0.1 * g.abs()), ("exp_avg_sq", g.square())):
        found = outer(scoped(held, name), 0, 48).view(a, b)
        for axis in (0, 1):
            torch.testing.assert_close(found.sum(axis), exact.view(a, b).sum(axis), rtol=1e-5, atol=1e-7)


def test_the_sums_of_smmf_are_those_of_adafactor() -> None:
    """The average of sums is the sum of averages: Adafactor's factors, in the most square shape."""
    official = pytest.importorskip("transformers.optimization").Adafactor
    a, b = square(48)
    one, params = on_weights("smmf", {"w": start_of((4, 12))}, hyper={"lr": 0.01})
    w = nn.Parameter(start_of((4, 12)).view(a, b).clone())
    other = official(
        [w], lr=0.01, eps=(0.0, 1e-3), decay_rate=-0.8, relative_step=False, scale_parameter=False
    )
    for g in gradients((4, 12), 4):
        step(one, params, {"w": g})
        w.grad = g.view(a, b).clone()
        other.step()
    held, state = outer(scoped(one.state[params["w"]], "exp_avg_sq"), 0, 48).view(a, b), other.state[w]
    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    torch.testing.assert_close(held, row[:, None] * col[None] / row.mean(), rtol=2e-6, atol=0)


def test_grams_has_the_sign_of_the_gradient_and_the_size_of_adam() -> None:
    grads, hyper = gradients((6, 9), 4), {"lr": 1e-2}
    zero = torch.zeros(6, 9)
    one = follow("adamw", zero, grads, hyper=hyper, modifiers="grams")
    plain = follow("adamw", zero, grads, hyper=hyper)
    for t in range(1, 4):
        grams, adam = one[t] - one[t - 1], plain[t] - plain[t - 1]
        assert torch.equal(grams.sign(), -grads[t].sign())
        torch.testing.assert_close(grams.abs(), adam.abs(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["lion", "signsgd"])
def test_steps_of_signs_are_of_three_kinds_and_know_no_scale(name: str) -> None:
    grads, zero = gradients((6, 9), 3), torch.zeros(6, 9)
    for g in grads:
        g[0] = 0.0
    one = follow(name, zero, grads, hyper={"lr": 0.5})
    other = follow(name, zero, [1e3 * g for g in grads], hyper={"lr": 0.5})
    assert torch.equal(one[-1], other[-1])
    assert {float(x) for x in (one[-1] - one[-2]).unique()} == {-0.5, 0.0, 0.5}


def test_8_bit_steps_are_near_those_of_bitsandbytes() -> None:
    """Its quantizer on a CPU is not that of a GPU: it looks codes up in bins, and has no code for zero."""
    bnb = pytest.importorskip("bitsandbytes")
    shape, hyper = (64, 128), {"lr": 1e-3, "weight_decay": 0.0}
    start, p = start_of(shape), nn.Parameter(start_of(shape))
    other = bnb.optim.AdamW8bit([p], **hyper)
    grads = gradients(shape, 10)
    for g in grads:
        p.grad = g.clone()
        other.step()
    mine = follow("adamw_8bit", start, grads, hyper=hyper)[-1]
    assert float((mine - p.detach()).norm()) < 0.05 * float((mine - start).norm())
