"""GRPO in plain PyTorch: sample, reward, advantage, clipped update. Run: python docs/examples/plain_ppo.py

The "language model" is one GRU. It learns to write ever larger tokens: the reward of a token is 1 when it is above
the one before. What it shows is where the fused operations go; a transformer takes the GRU's place unchanged.
"""

import torch
from airl_kernels import group_advantages, linear_logprob, linear_ppo_loss
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH, GROUPS, SAMPLES, EPOCHS = 32, 64, 12, 4, 16, 2


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids))[0]  # hidden states; the logits are never made in training


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor) -> Tensor:
    ids = prompts[:, None]
    for _ in range(LENGTH):
        ids = torch.cat((ids, torch.multinomial(policy.head(policy(ids)[:, -1]).softmax(-1), 1)), 1)
    return ids


def train(steps: int = 60, device: str = "cpu", seed: int = 0) -> list[float]:
    """The mean reward per token of every step."""
    torch.manual_seed(seed)
    policy = Policy().to(device)
    optimiser = torch.optim.Adam(policy.parameters(), lr=1e-2)
    group = torch.arange(GROUPS, device=device).repeat_interleave(SAMPLES)
    ends = torch.arange(GROUPS * SAMPLES + 1, dtype=torch.int32, device=device) * LENGTH
    history = []
    for _ in range(steps):
        ids = sample(policy, torch.randint(0, VOCAB // 2, (GROUPS,), device=device)[group])
        rewards, targets = (ids[:, 1:] > ids[:, :-1]).float(), ids[:, 1:].flatten()
        advantages = group_advantages(rewards.flatten(), ends, group, 0.9, baseline="all_tokens")
        with torch.no_grad():
            old = linear_logprob(policy(ids[:, :-1]).flatten(0, 1), policy.head.weight, targets)
        for _ in range(EPOCHS):
            hidden = policy(ids[:, :-1]).flatten(0, 1)
            loss, stats = linear_ppo_loss(hidden, policy.head.weight, targets, old, advantages, clip_high=0.28)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        history.append(rewards.mean().item())
        if len(history) % 10 == 0:
            print(f"step {len(history)}  reward {history[-1]:.3f}  entropy {stats.entropy:.3f}")
    return history


if __name__ == "__main__":
    train(device="cuda" if torch.cuda.is_available() else "cpu")
