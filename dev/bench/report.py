# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the benchmark has found: tables and the goals.
"""

import statistics

# Section: metric, its title, and how to show a value.
CPU = 'cpu_ns_per_packet', 'CPU time per packet, ns', '.0f'
LOST = 'lost', 'Packets lost, %', '.1f'
METRICS = {
    'capture': (CPU, LOST, (
        'max_rate', 'Highest rate without loss, packets/s', '.0f')),
    'inject': (CPU, LOST),
    'latency': (
        ('p50_us', 'Latency, median, us', '.0f'),
        ('p99_us', 'Latency, 99 %, us', '.0f')),
    'monitor': (
        ('p50_us', 'Round trip, median, us', '.0f'),
        ('p99_us', 'Round trip, 99 %, us', '.0f'),
        ('max_us', 'Round trip, longest, us', '.0f')),
    'sender': (('sender_ns_per_packet',
                "The sender's CPU time per packet, ns", '.0f'),),
    'growth': (CPU, LOST),
    'hold': (
        ('turns', 'Turns of the capture', '.0f'),
        ('p50_us', 'It holds the main loop for, median, us', '.0f'),
        ('max_us', 'Longest, us', '.0f'),
        ('long_turns', 'Turns of more than 300 us', '.0f')),
    'vhost': (CPU, LOST),
}

RATES = ('40k/s', '100k/s', '200k/s')


class Results:
    def __init__(self):
        self.samples = {}       # (section, metric): {row: {name: [values]}}
        self.errors = []

    def add(self, section, row, name, metrics):
        for metric, value in metrics.items():
            self.rows(section, metric).setdefault(row, {}).setdefault(
                name, []).append(value)

    def rows(self, section, metric):
        return self.samples.setdefault((section, metric), {})

    def values(self, section, row, name, metric):
        return self.rows(section, metric).get(row, {}).get(name, [])


def goals(results):
    """List (title, value, limit as text, whether it is met)."""
    found = []

    def goal(section, row, metric, limit, other=None, other_row=None,
             name='ours', least=False):
        """
        NAME's median, or its ratio to that of the contestant OTHER, is at most
        or at LEAST the limit.
        """
        title = f'{section}, {row}, {metric}: {name}'
        mine, theirs = results.values(section, row, name, metric), [1]
        if other:
            title += f' / {other}'
            theirs = results.values(section, other_row or row, other, metric)
        if mine and theirs and statistics.median(theirs):
            value = statistics.median(mine) / statistics.median(theirs)
            found.append((title, value, f'{">=" if least else "<="} {limit:g}',
                          value >= limit if least else value <= limit))

    for size, chain, tcpdump in (('64 B', 1 / 20, 2), ('1500 B', 1 / 8, 1)):
        for row in (f'{size} {rate}' for rate in RATES):
            goal('capture', row, CPU[0], chain, 'chain')
            goal('capture', row, CPU[0], tcpdump, 'tcpdump')
            # Else the time of the others would be worth nothing.
            goal('capture', row, 'lost', 0.1)
            for way in ('', ', rx', ', both'):
                goal('capture', row + way, CPU[0], 1.5, 'ours-tx', row)
            goal('inject', row, CPU[0], 2, 'loop')
    for size, chain in (('64 B', 6), ('64000 B GSO', 1.2),
                        ('64 B and GSO', 1.2)):
        goal('capture', f'{size} max', 'max_rate', chain, 'chain', least=True)
        goal('capture', f'{size} max', 'max_rate', 0.8, 'tcpdump', least=True)
    for row in ('64000 B GSO 2k/s', '64000 B GSO 10k/s'):
        goal('capture', row, CPU[0], 1.15, 'loop')
    goal('growth', 'TAPs: 128', CPU[0], 3, 'ours', 'TAPs: 1')
    goal('latency', '1k/s', 'p50_us', 1.5, 'straightforward')
    goal('latency', '100k/s', 'p99_us', 1, 'straightforward')
    for row in ('full capture', 'peer stalled'):
        goal('monitor', row, 'p99_us', 5000)
    goal('hold', 'flood', 'max_us', 1000)
    goal('sender', '100k/s', 'sender_ns_per_packet', 1.05, 'nobody',
         name='off')
    return found


def show(results, section, row, name, metric, style):
    values = results.values(section, row, name, metric)
    if not values:
        return '-'
    # What is known of some values is only that it is more.
    more = results.values(section, row, name, 'at_least')
    text = '> ' if more and statistics.median(more) else ''
    text += format(statistics.median(values), style)
    if len(values) > 1:
        text += f' [{min(values):{style}}..{max(values):{style}}]'
    return text


def print_table(results, section, metric, title, style):
    rows = results.rows(section, metric)
    if metric == 'lost':
        rows = {row: found for row, found in rows.items()
                if any(max(values) >= 0.05 for values in found.values())}
    if not rows:
        return
    names = list(dict.fromkeys(name for found in rows.values()
                               for name in found))
    lines = [[title, *names]] + [
        [f'  {row}', *(show(results, section, row, name, metric, style)
                       for name in names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]),
              sep='  ')
    print()


def print_all(results, about, rounds):
    """ABOUT is a line."""
    print(about)
    print(f'Medians of {rounds} rounds, with [least..greatest].\n')
    for section, metrics in METRICS.items():
        if any(results.rows(section, metric) for metric, _, _ in metrics):
            print(f'=== {section}\n')
        for metric, title, style in metrics:
            print_table(results, section, metric, title, style)
    if found := goals(results):
        print('=== goals\n')
    for title, value, limit, met in found:
        print(f'  {"met" if met else "missed":6}  {title:64} {value:9.3g}  '
              f'{limit}')
    for text in results.errors:
        print(f'ERROR {text}')
