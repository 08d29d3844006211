"""`sid launch [TORCHRUN OPTIONS] train CONFIG.yaml ...`: torchrun, whose own report of a mistake is left out.

torchrun ends what fails with a traceback of its own and a table of exit codes, behind the line in which Sid has named
the mistake. This is torchrun's launcher without them: its options, its rendezvous, its restarts.
"""

from __future__ import annotations

import argparse
import logging
import signal

from sidlm.cli.common import Parser
from sidlm.cli.main import EXIT_ERROR
from sidlm.errors import SidError

LAUNCHED = ("train", "extend")


def main(argv: list[str]) -> int:
    """Run the command in all processes; 0, or the status of the first one that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import run

    args = arguments(argv)
    logging.disable(logging.ERROR)  # of torchrun, here: what it reports of its processes they have said
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_ERROR:
            return EXIT_ERROR  # a mistake, which the first process has named
        how = f"was ended by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "failed"
        raise SidError(f"process {rank} (pid {failure.pid}) {how}; restarts used up: {args.max_restarts}") from error
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        raise SidError(f"{args.rdzv_endpoint or args.master_addr}: {error}") from error
    except (AssertionError, ValueError) as error:  # options that do not fit together
        raise SidError(str(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    return 0


def arguments(argv: list[str]) -> argparse.Namespace:
    """torchrun's, with Sid's command as its program. Raises SidError for one that several processes cannot run."""
    from torch.distributed.run import get_args_parser

    parser = Parser(
        "launch",
        "Start `sid train` or `sid extend` in several processes, on one or many nodes: torchrun with its options "
        "(`torchrun --help`), but a mistake is one line and nothing else.",
        "  sid launch --nproc-per-node 8 train configs/8b.yaml --data.train notes.txt\n"
        "  sid launch --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 train ...",
    )
    if argv and argv[0] in ("-h", "--help"):
        parser.parse_args(argv)
    options = get_args_parser()
    options.error, options.allow_abbrev = parser.error, False  # as for every other command
    args = options.parse_args(argv)
    if args.training_script not in LAUNCHED:
        parser.error(f"expected {' or '.join(LAUNCHED)} behind torchrun's options, got {args.training_script!r}")
    args.training_script_args = [args.training_script, *args.training_script_args]
    args.module, args.training_script = True, "sidlm.cli.main"
    return args
