package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/go-qcow2/qcow2"
)

// childVariable is the environment variable that makes this program do one piece of work of the library, so that
// it can be measured like a process of QEMU: its value names the work, the arguments say on what.
const childVariable = "QCOW2_CHECKBENCH_CHILD"

// children are the pieces of work.
var children = map[string]func(args []string) error{
	"check": checkImage,
	"write": func(args []string) error { return writeImage(args[0], qcow2.OverlapAll) },
}

// child returns the command for a piece of work.
func child(work string, args ...string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), childVariable+"="+work)
	return cmd, nil
}

// errNoChild says that the program was started by somebody else.
var errNoChild = errors.New("not a child")

// runChild does the work that this process was started for.
func runChild() error {
	work := children[os.Getenv(childVariable)]
	if work == nil {
		return errNoChild
	}
	return work(os.Args[1:])
}

// checkImage checks the image at a path as qemu-img check does, and demands that nothing is found.
func checkImage(args []string) error {
	img, err := qcow2.Open(args[0], &qcow2.OpenOptions{CheckOnly: true})
	if err != nil {
		return err
	}
	defer img.Close()
	res, err := img.Check(context.Background(), nil)
	if err != nil {
		return err
	}
	if !res.Clean() {
		return fmt.Errorf("%s: %d corruptions, %d leaks, %d errors", args[0], res.Corruptions, res.Leaks, res.CheckErrors)
	}
	fmt.Printf("%d of %d clusters are allocated\n", res.AllocatedClusters, res.TotalClusters)
	return nil
}
