"""nnU-Net's own trainer, ended by the clock. beside_nnunet.py copies this file into the environment
that it makes for nnU-Net; it is told MINUTES and SEED by environment variables of these names.

The network, its first weights, batches, augmentation, loss, optimiser and gradient clipping are
nnU-Net's. Three things are not, each in its favour where minutes are few:

- Iterations are not counted in epochs of 250. nnU-Net's rate in epoch e of E is 0.01 (1 - e/E)^0.9.
  Here each iteration has its own: after i of them in t seconds, one takes t/i, and n = T i/t fill
  the T seconds given, so that its rate 0.01 (1 - i/n)^0.9 is 0.01 (1 - t/T)^0.9. The number n is
  thus measured anew at each iteration, and the schedule is complete at the end, however fast the
  machine is or becomes. No further iteration begins if the end of the one before lies nearer to T.
- No time goes to nnU-Net's online validation (50 iterations after every 250), on which its last
  weights, the ones used by default, do not depend.
- The clock starts when the first batches are augmented and waiting.
"""

import json
import os
from pathlib import Path
from time import perf_counter

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tqdm import tqdm

# nnU-Net's commands take all cores of the machine, before they look for the trainer.
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class nnUNetTrainerByTheClock(nnUNetTrainer):
    """nnU-Net's training in MINUTES of wall time; what it took is in clock.json beside the fold."""

    def initialize(self):
        torch.manual_seed(int(os.environ["SEED"]))  # the weights; augmentation has no seed
        super().initialize()

    def run_training(self):
        budget = 60 * float(os.environ["MINUTES"])
        self.on_train_start()
        self.network.train()
        spent, waited, done = 0.0, 0.0, 0
        bar = tqdm(total=round(budget), desc="nnU-Net", unit="s")
        began = perf_counter()
        while not done or spent + spent / done / 2 < budget:
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * (1 - spent / budget) ** 0.9
            asked = perf_counter()
            batch = next(self.dataloader_train)
            waited += perf_counter() - asked
            loss = float(self.train_step(batch)["loss"])
            done += 1
            spent = perf_counter() - began
            bar.set_postfix_str(f"{done} iterations, loss {loss:.2f}", refresh=False)
            bar.update(min(round(spent), bar.total) - bar.n)
        bar.close()
        Path(self.output_folder, "clock.json").write_text(json.dumps({
            "seconds": spent, "iterations": done, "waited": waited, "loss": loss,
            "batch": list(batch["data"].shape)}), encoding="utf-8")
        self.on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False):
        """The held-out scans are predicted by nnUNetv2_predict."""
