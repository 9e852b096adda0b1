package failure
const envJump = "PILLION_FAILURE_JUMP"
func letIn(args []string) error { return nil }
