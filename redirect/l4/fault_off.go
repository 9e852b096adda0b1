//go:build !pillion_fault

package l4

// fault does nothing.
func fault(int) {}

// poison does nothing.
func poison(*conn) {}
