"""Where the numbers of a network come from: files of several libraries, known weights, bundles."""
