"""train a model (pre-training, SFT, DPO); resumes with ckpt_path=last"""

from __future__ import annotations

from ic.config.run import RunConfig as Config


def run(config: Config) -> int:
    from ic.run.train import train

    return train(config)
