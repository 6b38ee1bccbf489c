package qcow2

import "testing"

// TestOverlapKindsString names sets of kinds.
func TestOverlapKindsString(t *testing.T) {
	for kinds, want := range map[OverlapKinds]string{
		0:                                   "nothing",
		OverlapRefcountBlock:                "refcount block",
		OverlapActiveL2 | OverlapInactiveL2: "active L2 table, inactive L2 table",
		OverlapMainHeader | 1<<15:           "header, unknown kinds 0x8000",
		overlapAllKinds: "header, active L1 table, active L2 table, refcount table, refcount block, snapshot table, " +
			"inactive L1 table, inactive L2 table, bitmap directory, crypto header",
	} {
		if got := kinds.String(); got != want {
			t.Errorf("%#x is %q, want %q", uint16(kinds), got, want)
		}
	}
}

// TestOverlapPreset compares the presets with QEMU's (block/qcow2.h: QCOW2_OL_CONSTANT and so on), in whose bits the
// kinds are given.
func TestOverlapPreset(t *testing.T) {
	var zero OverlapPreset
	for _, tt := range []struct {
		preset OverlapPreset
		name   string
		want   OverlapKinds
	}{
		{zero, "all", 0x1ff | OverlapCryptoHeader},
		{OverlapAll, "all", 0x1ff | OverlapCryptoHeader},
		{OverlapCached, "cached", 0x17f | OverlapCryptoHeader},
		{OverlapConstant, "constant", 0x12b | OverlapCryptoHeader},
		{OverlapNone, "none", 0},
		{17, "OverlapPreset(17)", overlapAllKinds},
	} {
		if got := tt.preset.kinds(); got != tt.want || tt.preset.String() != tt.name {
			t.Errorf("%v has kinds %v, want %s with %v", tt.preset, got, tt.name, tt.want)
		}
	}
}
