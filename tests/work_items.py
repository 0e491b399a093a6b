"""Items of a list of work, and what is done with one."""

ITEMS = {number: {"x": number} for number in range(4)}


def double(item):
    return float(item["x"]), {"twice": 2 * item["x"]}
