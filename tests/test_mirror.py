"""Which classes are each other's mirror image, by their names."""

import pytest

from tinyseg.data import augment, mirror


@pytest.mark.parametrize("names, pairs, alone", [
    (["left kidney", "spleen", "right kidney"], [("left kidney", "right kidney")], []),
    (["RightParotid", "LeftParotid"], [("RightParotid", "LeftParotid")], []),
    (["kidney_left", "kidney_right", "LUNG LEFT", "LUNG RIGHT"],
     [("kidney_left", "kidney_right"), ("LUNG LEFT", "LUNG RIGHT")], []),
    (["L-eye", "R-eye", "Parotid_L", "Parotid_R", "LCochlea", "RCochlea"],
     [("L-eye", "R-eye"), ("Parotid_L", "Parotid_R"), ("LCochlea", "RCochlea")], []),
    (["Lt. femur", "Rt. femur"], [("Lt. femur", "Rt. femur")], []),
    (["左肾", "右肾", "肝"], [("左肾", "右肾")], []),
    (["lung_upper_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right"],
     [("lung_upper_lobe_left", "lung_upper_lobe_right")], ["lung_middle_lobe_right"]),
    (["left atrium", "right atrium", "left ventricle"], [],
     ["left atrium", "right atrium", "left ventricle"]),
    (["Left-Lateral-Ventricle", "Right-Lateral-Ventricle"],
     [("Left-Lateral-Ventricle", "Right-Lateral-Ventricle")], []),
    (["ctx-lh-cuneus", "ctx-rh-cuneus", "leftkidney", "rightkidney"],
     [("ctx-lh-cuneus", "ctx-rh-cuneus"), ("leftkidney", "rightkidney")], []),
    (["lkid", "rkid", "Eye_AL", "Eye_AR", "Rib_L1", "Rib_R1", "liver"], [],
     ["lkid", "rkid", "Eye_AL", "Eye_AR", "Rib_L1", "Rib_R1"]),
    (["LV", "RV", "MYO"], [], ["LV", "RV"]),
    (["Kidney_L", "kidney l", "kidney r"], [], ["Kidney_L", "kidney l", "kidney r"]),
    (["background", "pancreas", "cancer", "vertebrae_L1", "vertebrae L5", "bright", "clear",
      "Anterior", "Posterior", "NCR", "ET", "class 1", "myocardium"], [], []),
])
def test_sides_are_read_from_the_names(names, pairs, alone):
    assert mirror.sides(names) == (pairs, alone)


def test_pairs_of_names_as_classes():
    names = ["background", "l", "m", "r"]
    assert mirror.numbered([("r", "l")], names) == [(3, 1)]
    assert mirror.permutation(4, [(3, 1)]).tolist() == [0, 3, 2, 1]
    with pytest.raises(ValueError, match="'q'.*'m'"):
        mirror.numbered([("l", "q")], names)
    for twice in ([("l", "l")], [("l", "r"), ("r", "m")]):
        with pytest.raises(ValueError, match="twice"):
            mirror.numbered(twice, names)


def test_the_names_are_found_where_they_were():
    assert all(getattr(augment, name) is getattr(mirror, name)
               for name in ("LEFT_RIGHT", "sides", "numbered", "permutation"))
