"""Files of data that nothing reads, by name; all are encoded in Latin-1."""

_EXAMPLE = '{"messages": [{"role": "user", "content": "Où ?"}, {"role": "assistant", "content": "Là."}]}'

UNREADABLE = {
    "latin.jsonl": f"{_EXAMPLE}\n",
    "latin.json": f"[{_EXAMPLE}]",
    "latin.csv": "messages\nOù ?\n",
    "uneven.csv": "messages\na\nb,c,d\n",
}
