"""What the doctor finds: one sentence with a value and, where something is wrong, the mend; as a table and as JSON."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from toolkit.errors import UserError, first_line
from toolkit.spans import spans

OK, WARNING, ERROR = "ok", "warning", "error"
ORDER = (
    "versions", "accelerator", "processor", "memory", "compiled ops", "compiler", "caches", "ports", "names", "shared memory", "open files", "locked memory",
    "processes", "disk", "shards", "tokenizer", "model", "ds_config", "run folder", "ranks", "placement", "shared folder", "clocks", "all-reduce", "pairs",
)  # fmt: skip
WIDTH, FEW = 150, 4


@dataclass(frozen=True)
class Finding:
    """status: ok, warning (training runs, worse or not as meant) or error (it will not run). mend: a command or setting, "" where nothing is wrong."""

    check: str
    status: str
    text: str
    mend: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, OK, text)


def warning(check: str, text: str, mend: str) -> Finding:
    return Finding(check, WARNING, text, mend)


def error(check: str, text: str, mend: str) -> Finding:
    return Finding(check, ERROR, text, mend)


def of_user_error(check: str, problem: UserError) -> Finding:
    """The toolkit's own errors are `what is wrong; the mend`; one without a semicolon has both in one."""
    text, semicolon, mend = str(problem).rpartition("; ")
    return error(check, text, mend) if semicolon else error(check, mend, "correct what it names")


def checked(check: str, look: Callable[..., Iterable[Finding]], *given) -> list[Finding]:
    """The findings of `look(*given)`. What a check could not do is no reason to end the others, and is not ok."""
    try:
        return list(look(*given))
    except UserError as problem:
        return [of_user_error(check, problem)]
    except Exception as problem:  # a machine can be broken in any way
        return [warning(check, f"could not be checked: {type(problem).__name__}: {first_line(problem)}", "look at it by hand")]


def report_of(by_rank: dict[int, list[Finding]], hosts: dict[str, list[int]], skipped: dict[str, str], measured: dict, world: int = 1) -> dict:
    """{"title", "status", "world", "hosts", "findings", "not_checked", "measured"}.

    findings: in the order of the checks, each sentence once with the `ranks` that it is of. not_checked: what, and why. measured: the figures behind
    the sentences on clocks, all-reduce and pairs.
    """
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in sorted(by_rank.items()):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    found = [{**finding.__dict__, "ranks": ranks[finding]} for finding in sorted(ranks, key=lambda finding: ORDER.index(finding.check))]
    status = next(status for status in (ERROR, WARNING, OK) if status == OK or any(finding["status"] == status for finding in found))
    title = f"heartspeed doctor: {world} rank{'s' * (world > 1)} on {', '.join(list(hosts)[:8])}{', ...' * (len(hosts) > 8)}"
    return {"title": title, "status": status, "world": world, "hosts": hosts, "findings": found, "not_checked": skipped, "measured": measured}


def table(report: dict) -> str:
    """The report for people: a line a finding, its mend beneath it; of good news of one kind from many nodes the first few."""
    findings, leaders = report["findings"], [ranks[0] for ranks in report["hosts"].values()]
    wide = max(len(finding["check"]) for finding in findings)
    lines, said = [report["title"], ""], Counter()
    for finding in findings:
        said[finding["check"]] += finding["status"] == OK
        if finding["status"] == OK and said[finding["check"]] > FEW:
            continue
        whose = "" if len(finding["ranks"]) == report["world"] or finding["ranks"] == leaders else f" [rank {spans(finding['ranks'])}]"
        head = f"{finding['status'] if finding['status'] == OK else finding['status'].upper():<7}  {finding['check']:<{wide}}  "
        lines += textwrap.wrap(finding["text"] + whose, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
        if finding["mend"]:
            lines.append(" " * len(head) + f"-> {finding['mend']}")  # not wrapped: it may be a command
    lines += ["", *(f"{count - FEW} more are ok: {check}" for check, count in said.items() if count > FEW)]
    lines += [f"not checked: {what} ({why})" for what, why in report["not_checked"].items()]
    count = Counter(finding["status"] for finding in findings)
    return "\n".join([*lines, ", ".join(f"{count[status]} {status}{'s' * (count[status] != 1)}" for status in (ERROR, WARNING))])
