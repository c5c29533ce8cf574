"""One step, many times: batches in, weights moved, records out. The only user of gradients."""
