"""Motion: process groups, and the DeepSpeed engines that train a layer plan."""
