"""What a posterior says about itself: LOO, diagnosis, a table of its layers, and the export to ArviZ."""

from typing import Any

import pandas as pd

from .._arguments import known_arguments_of_methods
from .._errors import check_count
from ..analysis.checks import LOO, Diagnosis
from ..data.rows import rows_for
from ..prediction.result import NumericPrediction, Prediction
from .diagnose import diagnose
from .state import PosteriorState
from .to_arviz import as_arviz


@known_arguments_of_methods
class AnalyzedPosterior(PosteriorState):
    """A posterior with the methods that examine it; :class:`~scalabl_pyro.Posterior` adds prediction and saving."""

    def loo(self, data: Any, **options: Any) -> LOO:
        """Compute the leave-one-out predictive density on the training rows.

        Importance weights correct for the difference between q and the posterior.

        Args:
            data: Training rows.
            options: Options of :meth:`log_weights`.

        Raises:
            ValueError: If there are fewer than 25 draws, or if all draws predict the same.

        Example:
            >>> posterior.loo(train_data, num_draws=200).elpd  # nats
        """
        return self.log_weights(data, **options).loo()

    def diagnose(
        self,
        data: Any,
        *,
        history: pd.DataFrame | None = None,
        num_draws: int = 1000,
        num_data: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Diagnosis:
        """Check the inference and the predictions: ``posterior.diagnose(train_data, history=result.history)``.

        ``str()`` of the result begins with what it means for people, such as "Do not trust the uncertainties yet,
        because ...". The checks compare q with the exact posterior of the model, given the learned factors: its tails
        (``pareto_k``), width, location, and correlations (``pareto_k``, ``importance_share``). They do not compare the
        model with the world: score held-out rows for that.

        Args:
            data: Training rows, or a random part of them.
            history: History of the fit, which shows whether the loss still falls, and whether it rose; None skips that.
            num_draws: Number of draws behind k-hat, width and location. With few draws k-hat misses a posterior that is
                half as wide, and its threshold is stricter. Each draw is a pass over all rows.
            num_data: Size of the training set, if ``data`` is a part of it.
            seed: Seed of the draws.
            batch_size: Number of rows per forward pass.

        Raises:
            ValueError: If there are fewer than 25 draws, or if ``num_data`` is smaller than ``data``.

        Example:
            >>> posterior.diagnose(train_data, history=result.history).to_frame()
        """
        check_count(num_draws=num_draws, batch_size=batch_size)
        return diagnose(
            self,
            rows_for(self.task.encode, data),
            history=history,
            num_draws=num_draws,
            num_data=num_data,
            seed=seed,
            batch_size=batch_size,
        )

    def summary(self, *, num_draws: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Make a table of posterior mean and standard deviation per layer, as root mean squares over the rank.

        Args:
            num_draws: Number of draws behind both.
            seed: Seed of the draws.

        Returns:
            One row per layer with columns ``rms_mean`` and ``rms_sd``.

        Example:
            >>> posterior.summary().sort_values("rms_sd")
        """
        check_count(num_draws=num_draws)
        s = self.sample(num_draws, seed=seed).s
        rows = [
            (part.mean(0).square().mean().sqrt().item(), part.var(0).mean().sqrt().item())
            for part in self.subspace.split(s)
        ]
        return pd.DataFrame(rows, columns=["rms_mean", "rms_sd"], index=pd.Index(self.subspace.names, name="layer"))

    def to_arviz(
        self,
        *,
        num_draws: int = 500,
        seed: int = 0,
        prediction: Prediction | NumericPrediction | None = None,
        prior: bool = False,
        prior_prediction: Prediction | NumericPrediction | None = None,
    ) -> Any:
        """Export draws to ArviZ: ``InferenceData`` with arviz 0.x, ``xarray.DataTree`` with arviz 1.x.

        Draws of :func:`scalabl_pyro.mcmc` are exported whole, chain by chain, with the group ``sample_stats``: energy,
        divergences, acceptance rate, step size and tree depth of each draw.

        Args:
            num_draws: Number of draws in the groups ``posterior`` and ``prior``.
            seed: Seed of the draws. Simulated answers use a seed derived from it.
            prediction: Prediction that adds, for its rows and draws, the group ``posterior_predictive``, and where the
                answers are known ``log_likelihood`` and ``observed_data``.
            prior: Whether to add the group ``prior``, draws of the prior of s.
            prior_prediction: Result of :meth:`prior_predictive`, which adds the group ``prior_predictive``. With the
                same seed, its draw i is draw i of ``prior``.

        Raises:
            TypeError: If ``prior`` is not a bool.

        Example:
            >>> az.summary(posterior.to_arviz(num_draws=500))
        """
        if not isinstance(prior, bool):
            raise TypeError(f"prior={prior!r}: expected True or False. The prior itself is that of the posterior.")
        return as_arviz(
            self,
            num_draws=num_draws,
            seed=seed,
            prediction=prediction,
            prior=prior,
            prior_prediction=prior_prediction,
        )
