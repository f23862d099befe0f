"""The ELBO in a loop of PyTorch Lightning: its Trainer, optimizer steps, accumulation, logs and checkpoints.

    pip install lightning
    python examples/lightning_loop.py           # SmolLM2-135M on Reuters news; about a minute on one CPU core
    python examples/lightning_loop.py --tiny    # a random model; seconds

``ElboLoss`` gives the loss, the parameter groups and the posterior. Any other loop can use it in the same way.
"""

import argparse
from pathlib import Path

import lightning
import torch
from _support.datasets import NEWS, reuters_r8, word_task
from _support.models import demo_llm, upper_blocks

import scalabl_pyro
from scalabl_pyro.integrations import ElboLoss


class BayesianModule(lightning.LightningModule):
    """Minimizes -ELBO / N. Its state is what the ELBO trains, and not the base model."""

    def __init__(self, loss: ElboLoss) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        """Compute the loss of a batch, and log its two parts."""
        terms = self.loss(batch)
        self.log_dict({name: value.detach() for name, value in terms.items()}, prog_bar=True, batch_size=4)
        return terms["loss"]

    def on_train_epoch_end(self) -> None:
        """Predict held-out rows under draws."""
        found = self.loss.posterior().predict(self.trainer.held_out, num_draws=8, seed=0).metrics().loc["value"]
        self.log_dict({"eval_nll": found["nll"], "eval_accuracy": found["accuracy"]})

    def configure_optimizers(self) -> dict:
        """Use the rates of the groups, with a linear decay."""
        optimizer = torch.optim.AdamW(self.loss.parameter_groups())
        num_steps = self.trainer.estimated_stepping_batches
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / num_steps, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def main() -> None:
    """Train, predict test rows, and save the posterior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use a random model, to test the script")
    parser.add_argument("--out", type=Path, default=Path("lightning_out"), help="folder of the results")
    args = parser.parse_args()
    rows, test = reuters_r8("train", count=160, seed=0), reuters_r8("test", count=60, seed=0)
    train, held_out = scalabl_pyro.data.stratified_split(rows, by="answer", share=0.25)

    lightning.seed_everything(0)
    llm, tokenizer = demo_llm(tiny=args.tiny)
    blora = scalabl_pyro.bayesian_lora(llm, r=8, layers_to_transform=upper_blocks(llm, 1))
    loss = ElboLoss(blora, word_task(tokenizer, train, NEWS, max_length=32), train)

    trainer = lightning.Trainer(
        max_epochs=4,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        accelerator="auto",
        devices=1,
        logger=False,
        default_root_dir=args.out,
        log_every_n_steps=5,
    )
    trainer.held_out = held_out
    trainer.fit(BayesianModule(loss), loss.batches(batch_size=4))
    print("  ".join(f"{name} {float(value):.3f}" for name, value in sorted(trainer.callback_metrics.items())))

    posterior = loss.posterior()
    posterior.save_pretrained(args.out / "posterior")
    print(posterior.predict(test, num_draws=10, seed=0).metrics().round(3).T.to_string())


if __name__ == "__main__":
    main()
