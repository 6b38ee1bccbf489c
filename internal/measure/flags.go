package measure

import (
	"flag"
	"regexp"
)

// Flags are the flags that the measuring commands share.
type Flags struct {
	Dir    string         // where files go; best a tmpfs
	Quick  bool           // a short run, for a look
	Filter *regexp.Regexp // rows to run, by their names
}

// ParseFlags reads the command line, with whatever flags the command has besides. quick says what is less in a quick
// run, and row names a row.
func ParseFlags(quick, row string) (Flags, error) {
	var f Flags
	flag.StringVar(&f.Dir, "dir", defaultDir(), "directory for the files; the figures are meant for a tmpfs")
	flag.BoolVar(&f.Quick, "quick", false, "a short run, for a look: "+quick)
	run := flag.String("run", "", "only rows that match the regular expression, as in '"+row+"'")
	flag.Parse()
	var err error
	f.Filter, err = regexp.Compile(*run)
	return f, err
}
