"""
Agent logs as datasets: what is trained is what was sent.

One file per format turns the lines of a log into [`LoggedRequest`]s (`requests`), each with the context that was sent
and the reply that came back; `examples` joins the requests of a conversation where the log is append-only, and keeps
each with its own context where it is not. Lines that cannot be trained as they were sent are bad lines (`bad_lines`).
Nothing here imports torch.
"""
