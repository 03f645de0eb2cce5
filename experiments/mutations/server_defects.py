"""Defects of what stands beside the methods: server optimisers, control variates, buffers.

Each names the law that it breaks, by the name of the test that must find it.
"""

from __future__ import annotations

from experiments.mutations.defects import Defect

FEDOPT, RULES = "strategies/server/fedopt.py", "fedraclora/server_optimiser.py"
BUFFER, KEPT = "strategies/server/buffer.py", "clients/kept.py"
VARIATES = "fedraclora/training/variates.py"
OPTIMISERS = ("tests/contract/test_server_optimisers.py",)
DRIFT = ("tests/contract/test_control_variates.py",)
BUFFERED = ("tests/contract/test_buffered_rounds.py",)
IN_WEIGHTS = "test_in_weights_the_server_follows_the_mean_of_the_clients_weights"
IN_FACTORS = "test_in_factors_momentum_is_projected_on_what_the_round_trains"
SCAFFOLD = "test_a_run_is_scaffold_on_the_weights_that_it_trains"
STEP = "test_every_step_is_the_discounted_mean_of_what_came"
SERVER_DEFECTS = (
    Defect(
        "server_momentum_forgotten",
        RULES,
        "d + self.beta * moments[f",
        "d + 0.0 * moments[f",
        f"{IN_WEIGHTS} and momentum",
        "FedAvgM: the velocity is not carried from round to round",
        tests=OPTIMISERS,
    ),
    Defect(
        "first_moment_forgotten",
        RULES,
        "            first = self.beta1 * old + (1 - self.beta1) * delta\n",
        "            first = delta + 0 * old\n",
        f"{IN_WEIGHTS} and adam",
        "FedAdam: the last change scaled by V alone",
        tests=OPTIMISERS,
    ),
    Defect(
        "moments_corrected_as_adam_does",
        RULES,
        "            steps[name] = self.lr * first / (second",
        "            begun = 1.0 if f'first/{name}' in moments else 1 - self.beta1\n"
        "            steps[name] = self.lr * first / begun / (second",
        f"{IN_WEIGHTS} and adam",
        "Flower's FedAdam: the first rounds corrected, which algorithm 2 of FedOpt has not",
        tests=OPTIMISERS,
    ),
    Defect(
        "second_moment_begins_at_nothing",
        RULES,
        "torch.full_like(delta, self.tau**2)",
        "torch.zeros_like(delta)",
        f"{IN_WEIGHTS} and adagrad",
        "Flower's FedOpt: V begins at 0, where the paper has tau^2",
        tests=OPTIMISERS,
    ),
    Defect(
        "yogi_moves_the_wrong_way",
        RULES,
        "torch.sign(old - square)",
        "torch.sign(square - old)",
        f"{IN_WEIGHTS} and yogi",
        "FedYogi: sign(Delta^2 - V)",
        tests=OPTIMISERS,
    ),
    Defect(
        "server_moments_begin_anew",
        FEDOPT,
        "    return {n: m for n, m in state.moments.items() if n.startswith(kinds)}\n",
        "    return {n: m for n, m in state.moments.items() if n in kinds}\n",
        f"{IN_WEIGHTS} and momentum",
        "an optimiser that is made anew in each round",
        tests=OPTIMISERS,
    ),
    Defect(
        "server_steps_beside_the_mean",
        FEDOPT,
        "(old[name] + steps[name] - new[name])",
        "steps[name]",
        f"{IN_WEIGHTS} and momentum",
        "resets nothing: the mean is merged, and the server's step is added",
        tests=OPTIMISERS,
    ),
    Defect(
        "momentum_left_beside_the_old_sketch",
        FEDOPT,
        "moment if same else transported(label, moment, old, new)",
        "moment",
        IN_FACTORS,
        "momentum of B under one A added under another",
        tests=OPTIMISERS,
    ),
    Defect(
        "momentum_moved_without_the_gram",
        "fedraclora/transport.py",
        "    return trained @ (old @ new.T) @ inverse\n",
        "    return trained @ (old @ new.T) + 0 * inverse[:1]\n",
        IN_FACTORS,
        "B A_old A_new^T, which is right for orthonormal rows alone",
        tests=OPTIMISERS,
    ),
    Defect(
        "correction_of_the_wrong_sign",
        KEPT,
        "{n: c.cpu() - own[n] for n, c in",
        "{n: own[n] - c.cpu() for n, c in",
        SCAFFOLD,
        "SCAFFOLD: g + c_k - c",
        tests=DRIFT,
    ),
    Defect(
        "correction_taken_away",
        VARIATES,
        "            out[name] = gradient + value[",
        "            out[name] = gradient - value[",
        "test_the_batch_of_clients_adds_what_the_one_client_loop_adds",
        "SCAFFOLD: the correction subtracted from the gradient",
        tests=DRIFT,
    ),
    Defect(
        "correction_counted_as_gradient",
        KEPT,
        "{n: g - downlink.variates[n].cpu() for n, g in directions.items()}",
        "dict(directions)",
        SCAFFOLD,
        "option II: c_k <- (x - y) / (K eta), without c_k - c",
        tests=DRIFT,
    ),
    Defect(
        "variates_in_the_coordinates_of_the_old_sketch",
        "strategies/server/scaffold.py",
        "    return True\n",
        "    return False\n",
        SCAFFOLD,
        "a variate of B kept as it is while A is drawn anew",
        tests=DRIFT,
    ),
    Defect(
        "variates_lifted_without_the_scale",
        VARIATES,
        "rtol=1e-6).to(step) / adapter.scale\n",
        "rtol=1e-6).to(step)\n",
        SCAFFOLD,
        "a gradient of B taken for one of the weight: alpha / r is forgotten",
        tests=DRIFT,
    ),
    Defect(
        "cohort_taken_for_everyone",
        "strategies/server/treatment.py",
        "share = exchange.rate_scale, len(got.clients) / exchange.loop.clients",
        "share = exchange.rate_scale, 1.0",
        SCAFFOLD,
        "c replaced by the mean over the cohort, whatever share of the clients that is",
        tests=DRIFT,
    ),
    Defect(
        "cohort_counted_twice",
        "strategies/server/treatment.py",
        "share = exchange.rate_scale, len(got.clients) / exchange.loop.clients",
        "share = exchange.rate_scale, (len(got.clients) / exchange.loop.clients) ** 2",
        SCAFFOLD,
        "the mean taken over all clients, then weighted by the cohort's share once more",
        tests=DRIFT,
    ),
    Defect(
        "steps_forgotten_in_the_mean_gradient",
        VARIATES,
        "/ (steps * rates[n]) for n in end",
        "/ rates[n] for n in end",
        SCAFFOLD,
        "(x - y) / eta, the sum of K gradients",
        tests=DRIFT,
    ),
    Defect(
        "stale_factor_beside_the_new_sketch",
        BUFFER,
        "        sent = now if group is together else group[0].sent\n",
        "        sent = now\n",
        f"{STEP} and fed_rac_lora",
        "B trained under A_t merged with A_(t + tau)",
        tests=BUFFERED,
    ),
    Defect(
        "stale_replies_count_in_full",
        BUFFER,
        " / (1 + late.double()).sqrt()\n",
        " / (1 + 0 * late.double()).sqrt()\n",
        STEP,
        "FedBuff: s(tau) = 1",
        tests=BUFFERED,
    ),
    Defect(
        "discount_divided_out_again",
        BUFFER,
        "weighted_sum(rows, weights) / total\n",
        "weighted_sum(rows, weights) / max(float(weights.sum()), 0 * total)\n",
        STEP,
        "a mean by discounted weights: a buffer of stale replies moves as far as one of fresh ones",
        tests=BUFFERED,
    ),
    Defect(
        "stale_weights_in_the_place_of_changes",
        BUFFER,
        "flights, rows - start.to(rows), got.weights)",
        "flights, rows + 0 * start.to(rows), got.weights)",
        f"{STEP} and (ffa_lora or fedavg)",
        "a reply taken for what the client ends with, not for what it has changed",
        tests=BUFFERED,
    ),
    Defect(
        "buffer_never_emptied",
        "strategies/buffered.py",
        "        waiting = [batch.select(flying) for batch in batches]\n",
        "        waiting = [batch.select(flying | landed) for batch in batches]\n",
        "test_a_reply_is_merged_once_and_waits_until_then",
        "resets nothing: what was merged lies in the buffer still",
        tests=BUFFERED,
    ),
)
