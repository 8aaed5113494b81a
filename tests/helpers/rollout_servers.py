"""Stand-ins for the rollout's servers and for verl's manager of weight syncs to them."""

from types import SimpleNamespace


class Server:
    """Stands for the Ray actor of a rollout server, and records what reaches the engine."""

    def __init__(self, events):
        self.events = events
        self.qerl_set_noise = SimpleNamespace(remote=self._set_noise)
        self.qerl_check_engine = SimpleNamespace(remote=lambda: events.append("alive"))
        self.clear_kv_cache = SimpleNamespace(remote=lambda: events.append("clear"))

    def _set_noise(self, seed, step, sigma, unit, rounding, router):
        assert unit == "absolute"
        self.events.append((seed, step, round(sigma, 6)))
        # what the engine finds in its weights, not what the schedule asked for
        acting = 0.99 * sigma
        return [
            {"absolute": acting, "relative": 2 * acting, "weight_min": 0.1, "weight_median": 0.5, "weight_max": 2.0}
        ]


class Manager:
    backend = "naive"

    def __init__(self, events):
        self.events = events
        self.replicas = [SimpleNamespace(server_handle=Server(events)), SimpleNamespace(server_handle=Server([]))]

        self.actor_wg = SimpleNamespace(update_weights=self._send)

    def _send(self, global_steps, mode):
        assert mode == "naive"
        self.events.append(f"sync {global_steps}")
        return ["rank 0", "rank 1"]
