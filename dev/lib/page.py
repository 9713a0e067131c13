# SPDX-License-Identifier: GPL-2.0-or-later
"""
The commands in a page of the documentation.
"""

import re
import textwrap

LITERAL = re.compile(
    # A literal block, which is indented further than the line before it
    r'^( *)(?:\.\. code-block:: *(?P<language>\w*)|(?!\.\.)\S.*::)\n\s*\n'
    r'(?P<block>(?:\1 +\S.*\n|\s*\n)+)'
    # or a command within the text
    r'|``(?P<inline>\{ *"execute".*\})``', re.M)
COMMAND = re.compile(
    r'(\(\w+\) )?\{ *"execute"|\(qemu\) |# \w+[-=]|-netdev ')


def read_page(path):
    """The literal blocks of each section that are commands, by its title."""
    page = path.read_text()
    titles = list(re.finditer(r'^(.+)\n([-~=^])\2{3,}\n', page, re.M))
    sections = {}
    for title, end in zip(titles, [*titles[1:], None]):
        blocks = sections[title[1]] = []
        for match in LITERAL.finditer(page, title.end(),
                                      end.start() if end else len(page)):
            text = match['inline'] or textwrap.dedent(match['block']).strip()
            if match['language'] in ('shell', 'python') or \
                    COMMAND.match(text):
                blocks.append(text)
    return sections
