"""Two ranks that count what their collectives bring with users of their own: FOLDER/bytes.json."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from attnrec import ShardedCatalog
from attnrec.catalog.sharded_group import disconnect

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # benches/ is not installed

from benches.scale_worker import Received  # noqa: E402

dist.init_process_group("gloo")
received = Received()
catalog = ShardedCatalog(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).requires_grad_())
received.total = 0
catalog.topk(torch.randn(5, 8), 6, own_users=True)
topk, received.total = received.total, 0
events = catalog.lookup(torch.randint(0, 30, (9,)), own_ids=True)
catalog.cross_entropy(events[:5], torch.randint(0, 30, (5,)), own_users=True).backward()
if dist.get_rank() == 0:
    Path(sys.argv[1], "bytes.json").write_text(json.dumps({"topk": topk, "loss": received.total}))
disconnect()
