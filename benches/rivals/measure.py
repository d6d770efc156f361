"""What every rival reports, under the names that `tune bench … --json` uses."""

import json
import os
import statistics
import time
from pathlib import Path


def age():
    """Seconds since this process was started, interpreter included; in steps of 10 ms."""
    after_boot = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - after_boot


def peak_rss_bytes():
    """VmHWM: the most memory that was resident at any time."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


class Watch:
    """Wall and processor time since it was made or last read."""

    def __init__(self):
        self.lap()

    def lap(self):
        now = time.perf_counter(), time.process_time()
        before, self.before = getattr(self, "before", now), now
        return now[0] - before[0], now[1] - before[1]


def median_rates(tokens, laps):
    """Tokens a second and tokens a second of processor time: medians over laps of `tokens` tokens each."""
    return statistics.median(tokens / wall for wall, _ in laps), statistics.median(tokens / cpu for _, cpu in laps)


def report(**fields):
    print(json.dumps(fields))
