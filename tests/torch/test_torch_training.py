"""Whole trainings with `gpurnn.torch`: a script whose import changed prints the same losses; several processes; Lightning."""

import copy
import itertools
import os
import tempfile

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")

from gpurnn import torch as ours  # noqa: E402

pytestmark = pytest.mark.oracle
nn = torch.nn


class LanguageModel(nn.Module):
    """Embedding, layers, head: the model of word-level examples, with hidden states carried from window to window."""

    def __init__(self, name, symbols=40, width=16, hidden=24, layers=2, dropout=0.2):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.recurrent = getattr(nn, name)(width, hidden, layers, dropout=dropout)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, tokens, state=None):
        y, state = self.recurrent(self.embedding(tokens), state)
        return self.head(nn.functional.dropout(y, 0.2, self.training)), state


def losses_of(model, steps=30, lr=2.0):
    """Truncated BPTT with SGD and clipping, as such scripts have it."""
    torch.manual_seed(0)
    text, state, losses = torch.randint(0, 40, (steps * 12 + 1, 5)), None, []
    for k in range(steps):
        tokens, targets = text[12 * k : 12 * k + 12], text[12 * k + 1 : 12 * k + 13]
        model.zero_grad()
        logits, state = model(tokens, state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-lr)
        state = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_script_prints_the_same_losses(name):
    torch.manual_seed(1)
    model = LanguageModel(name)
    expected = losses_of(copy.deepcopy(model))
    assert losses_of(ours.from_torch(model)) == pytest.approx(expected, abs=2e-5)
    assert expected[-1] != expected[0]


def rank_of_two(rank, folder, batch):
    """A process of DistributedDataParallel's; writes its gradients."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(ours.LSTM(5, 7, 2, bidirectional=True).double())
    y, (_, c) = model(batch[:, rank::2])
    (y.square().mean() + c.square().mean()).backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # what starts processes has warnings of its own
def test_two_processes():
    torch.manual_seed(3)
    batch = torch.randn(6, 4, 5, dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        ranks = [context.Process(target=rank_of_two, args=(rank, folder, batch)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        for process in ranks:
            process.kill()
        found = [torch.load(f"{folder}/{rank}") for rank in range(2)]
    torch.manual_seed(0)
    module = nn.LSTM(5, 7, 2, bidirectional=True).double()
    losses = []
    for rank in range(2):
        y, (_, c) = module(batch[:, rank::2])
        losses.append(y.square().mean() + c.square().mean())
    ((losses[0] + losses[1]) / 2).backward()
    for parameter, one, other in zip(module.parameters(), *found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.seen = ours.from_torch(LanguageModel("LSTM", dropout=0.0)), []

        def training_step(self, tokens, _):
            logits, _ = self.model(tokens[:-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    data, task = [torch.arange(13)[:, None] % 4 + torch.arange(5) for _ in range(30)], Task()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=None))
    assert task.seen[-1] < 0.7 * task.seen[0]


def test_a_policy_with_resets():
    """Episodes end within a batch: the state is set back where a row's mask says so, as reinforcement learners do."""
    torch.manual_seed(0)
    T, N, policy = 9, 3, ours.GRU(4, 6).double()
    reference = nn.GRU(4, 6).double()
    reference.load_state_dict(policy.state_dict())
    x, resets = torch.randn(T, N, 4, dtype=torch.float64), torch.rand(T, N) < 0.3
    assert resets[1:].any()

    def returns(module):
        state, outputs = torch.zeros(1, N, 6, dtype=torch.float64), []
        cuts = [0, *(t for t in range(1, T) if resets[t].any()), T]
        for begin, end in itertools.pairwise(cuts):
            state = state * (~resets[begin])[None, :, None]
            y, state = module(x[begin:end], state)
            outputs.append(y)
        torch.cat(outputs).square().sum().backward()
        return [torch.cat(outputs), *(parameter.grad for parameter in module.parameters())]

    for one, other in zip(returns(policy), returns(reference), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
