"""From raw downloads to batches: source layouts, WebDataset shards, index, epoch order, loaders."""
