"""From scores to keep indices to tokens: the arithmetic of patch selection.

Axes in this room: B images, N patches, P prefix tokens, L = P + N, D width, K kept patches.
Functions depend on their arguments alone, run without host synchronisation (`buckets_of`,
`cell_by_cell` and `validate_keep_indices` excepted), and can be scripted, traced, compiled and
exported.
"""
