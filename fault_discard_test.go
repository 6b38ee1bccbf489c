package qcow2

// faultDiscardScenarios are the scenarios with Discard and WriteZeroes.
func faultDiscardScenarios() []faultScenario {
	tiny := OpenOptions{L2CacheBytes: 1, RefcountCacheBytes: 1, Discard: DiscardAll}
	kept := tiny
	kept.DiscardNoUnref = true
	return []faultScenario{
		{
			name: "discard", size: 256 << 10, create: CreateOptions{ClusterSize: 512}, open: tiny,
			prepare: []faultStep{{'w', 0, 40_000}, {'c', 120, 20}},
			steps: []faultStep{
				{'d', 1024, 4096}, {'w', 50_000, 6000}, {'s', 0, 0}, {'d', 0, 40_000}, {'w', 1_000, 3000}, {'u', 61_440, 5_000}, {'s', 0, 0},
				{'z', 49_900, 2000}, {'d', 0, 256 << 10}, {'s', 0, 0}, {'w', 23_000, 512},
			},
		},
		{
			name: "discard with snapshot", size: 120 << 10, create: CreateOptions{ClusterSize: 512, RefcountBits: 64}, open: tiny,
			prepare: []faultStep{{'w', 0, 40_000}, {'c', 80, 30}},
			change:  addTestSnapshot,
			steps: []faultStep{
				{'d', 512, 2048}, {'w', 33_000, 3000}, {'u', 40_960, 8192}, {'s', 0, 0}, {'w', 1_000, 2000}, {'z', 1_500, 10_000}, {'s', 0, 0},
				{'d', 0, 120 << 10}, {'r', 0, 120 << 10}, {'w', 2_000, 4000},
			},
		},
		{
			name: "discard over base", size: 1 << 20, create: CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true, BackingFile: "base", BackingFormat: "raw"},
			base: 700_000, open: kept,
			prepare: []faultStep{{'w', 1_000, 10_000}, {'c', 8, 2}},
			steps: []faultStep{
				{'d', 0, 16 << 10}, {'z', 40_000, 30_000}, {'s', 0, 0}, {'w', 2_000, 300}, {'u', 131_100, 600}, {'d', 128 << 10, 256 << 10},
				{'r', 0, 1 << 20}, {'w', 150_000, 20_000}, {'s', 0, 0}, {'z', 699_900, 300},
			},
		},
		{
			name: "discard of version 2", size: 128 << 10, create: CreateOptions{Version: 2, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"},
			base: 50_001, open: tiny,
			prepare: []faultStep{{'w', 60_000, 20_000}},
			steps:   []faultStep{{'z', 1_000, 10_000}, {'u', 65_536, 8192}, {'s', 0, 0}, {'z', 48_000, 5_000}, {'w', 100_000, 10_000}},
		},
		{
			name: "discard with data file", size: 300<<10 + 512, create: CreateOptions{ClusterSize: 1024, DataFile: "data"}, open: tiny,
			prepare: []faultStep{{'w', 0, 30_000}},
			steps: []faultStep{
				{'d', 1024, 4096}, {'s', 0, 0}, {'w', 2_000, 2000}, {'u', 10_000, 5000}, {'z', 140_000, 2000}, {'s', 0, 0}, {'d', 0, 300<<10 + 512},
				{'r', 0, 300 << 10}, {'w', 300<<10 + 100, 1}, {'s', 0, 0},
			},
		},
		{
			name: "zero raw data file", size: 64 << 10, create: CreateOptions{ClusterSize: 1024, DataFile: "data", DataFileRaw: true},
			prepare: []faultStep{{'w', 0, 30_000}},
			steps:   []faultStep{{'d', 1024, 4096}, {'s', 0, 0}, {'z', 9_000, 2000}, {'w', 2_000, 300}, {'r', 0, 64 << 10}},
		},
	}
}

// zero carries out a step that makes zeros and tells the model. Its ranges are such that a Discard reaches no part of a
// cluster but the disk's last, and hides no backing file in version 2.
func (r *faultRun) zero(s faultStep) (err error) {
	switch s.op {
	case 'd':
		err = r.img.Discard(s.off, s.n)
	case 'z':
		err = r.img.WriteZeroes(s.off, s.n, 0)
	default:
		err = r.img.WriteZeroes(s.off, s.n, ZeroMayUnmap)
	}
	off, end := s.off, s.off+s.n
	if cs := int64(r.img.Info().ClusterSize); s.op == 'd' {
		off = (off + cs - 1) / cs * cs
		if end != r.sc.size {
			end = end / cs * cs
		}
	}
	p := make([]byte, end-off)
	n := len(p)
	if err != nil {
		n = 0
	}
	r.model.wrote(off, p, n)
	return err
}
